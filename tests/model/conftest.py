from pathlib import Path

import pytest

from tests.support.bases import tiny_base


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory) -> Path:
    """A directory with the tiny Llama base."""
    directory = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(directory)
    return directory
