"""Subjects collect garbage around every sample; what was imported before need not be gone through each time."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    gc.freeze()
    yield
    gc.unfreeze()
