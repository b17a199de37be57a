"""Storey 0: what a user can set. Standard library only, apart from reading YAML."""
