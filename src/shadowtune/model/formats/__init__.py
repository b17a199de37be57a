"""Third-party formats: shadow-peft, the Shadow tuner of PEFT, and projected causal language models."""
