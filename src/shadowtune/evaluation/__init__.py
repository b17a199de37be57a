"""Storey 5: how good a model is, by generation and by loss."""
