"""Directories of other libraries: shadow-peft, the Shadow tuner of PEFT, and projected causal language models."""
