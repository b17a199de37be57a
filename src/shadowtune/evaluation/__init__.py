"""Evaluation of finished runs: metrics, generation, reports, the lm-evaluation-harness."""
