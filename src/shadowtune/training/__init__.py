"""Storey 4: training on top of transformers' Trainer."""
