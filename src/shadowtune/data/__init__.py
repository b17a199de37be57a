"""Storey 3: text in, tensors out."""
