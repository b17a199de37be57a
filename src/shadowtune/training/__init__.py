"""Training on top of ``transformers.Trainer``."""
