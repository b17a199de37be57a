"""Comparison of methods on tasks: equal budgets, paired intervals, a report."""
