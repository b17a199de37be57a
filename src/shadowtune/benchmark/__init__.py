"""Storey 5: measure ours against the peers, interleaved in one run, and keep every result."""
