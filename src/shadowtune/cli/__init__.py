"""Storey 5: parse, call one function, print. No logic."""
