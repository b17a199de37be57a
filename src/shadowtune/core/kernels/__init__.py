"""Fast operations, each tested against plain torch operations: boundaries, and cross-entropy behind a linear head."""
