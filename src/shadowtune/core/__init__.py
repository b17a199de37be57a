"""Storey 1: the paper's mathematics in torch alone. It knows neither models nor files."""
