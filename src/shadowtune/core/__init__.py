"""The paper's mathematics: boundaries, losses and their fast operations. Knows torch, but no models and no files."""
