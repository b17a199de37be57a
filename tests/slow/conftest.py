"""Registers the markers of transformers' own tests, and lets these call what is deprecated."""

import pytest

MARKERS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")


def pytest_configure(config):
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of transformers' tests")


@pytest.fixture
def nothing_deprecated_is_called():
    """Takes the place of the check in ``tests/conftest.py``."""
