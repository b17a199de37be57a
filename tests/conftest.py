"""Settings of every test process: no network, one thread (two processes share the cores), CUDA
kernels through Triton's interpreter where there is no GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

LONG = ("test_readme.py", "test_compare.py", "test_demo.py", "test_robot.py", "test_compile.py", "test_harness.py")
"""Files that go first: each is one process's for minutes, and last it would leave the others idle."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
