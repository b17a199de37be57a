"""Settings of every test process: no network, one thread (two processes share the cores), CUDA
kernels through Triton's interpreter where there is no GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

LONGEST = ("test_readme.py", "test_compare.py", "test_lm_eval.py", "test_compile.py", "test_demo.py")
"""Files whose few tests take minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no process works on it alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
