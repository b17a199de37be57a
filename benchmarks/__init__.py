"""Benchmarks of shadowtune against other methods, and their results; ``python -m benchmarks --help`` lists them."""
