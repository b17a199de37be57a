"""Storey 3: things with weights."""
