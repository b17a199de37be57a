"""How property tests run: the same examples each time, nothing written to disk, no wall clock."""

from hypothesis import HealthCheck, settings

property_test = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
"""Decorator of tests under ``@given``."""
