"""Replay recorded answers of edge and cloud under routing policies: accuracy, cost and latency without any model."""
