"""Storey 7: parse, call one function, print. No logic."""
