"""Settings of every test process: no network, one thread (two processes share the cores), CUDA
kernels through Triton's interpreter where there is no GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

LONG = ("test_readme.py", "test_compare.py", "test_demo.py", "test_robot.py", "test_compile.py", "test_harness.py")
"""Files that go first: each is one process's for minutes, and last it would leave the others idle."""


UPSTREAM = ("'min_new_tokens'",)
"""Parts of deprecations that a library reports of its own calls: transformers of how it calls an assistant model."""


OTHERS = (
    "benchmark",
    "comparison",
    "parity",
    "formats",
    "test_bench.py",
    "test_convert.py",
    "test_inspection.py",
    "test_adapters.py",
)
"""Directories and files of tests that run third-party tuners, whose own calls are theirs to mend: shadow-peft 0.1 and
the Shadow tuner of peft 0.21 hand the cache on by its old name."""


def _runs_others(item):
    return bool(set(OTHERS) & set(item.path.parts))


class _Deprecations(logging.Handler):
    """Collects log records that call something deprecated: transformers logs some where others warn."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        if "deprecat" in message.lower() and not any(part in message for part in UPSTREAM):
            self.messages.append(message)


@pytest.fixture(autouse=True)
def nothing_deprecated_is_called(request):
    """Fail the test in which the log says that a deprecated name was used."""
    if _runs_others(request.node):
        yield
        return
    handler = _Deprecations()
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "trl", "accelerate", "torch")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    assert not handler.messages, handler.messages


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if _runs_others(item):
            item.add_marker(pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"))
