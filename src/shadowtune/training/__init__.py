"""Storey 5: training on top of transformers' Trainer."""
