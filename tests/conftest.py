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

LONG = (
    "test_readme.py",
    "test_pretraining.py",
    "test_registration.py",
    "test_trainer.py",
    "test_run.py",
    "test_plan.py",
    "test_compile.py",
    "test_compare.py",
    "test_watching.py",
    "test_card.py",
    "test_resume.py",
    "test_connection.py",
    "test_checkpoints.py",
    "test_demo.py",
    "test_robot.py",
    "test_harness.py",
)
"""Files that go first: each occupies one process for long, and last it would leave the others idle."""


UPSTREAM = ("'min_new_tokens'",)
"""Parts of deprecations that a library reports of its own calls: transformers of how it calls an assistant model."""


OTHERS = (
    "benchmarks",
    "comparison",
    "parity",
    "formats",
    "test_convert.py",
    "test_inspection.py",
    "test_adapters.py",
)
"""Directories and files of tests that run third-party tuners, whose own calls are theirs to mend: shadow-peft 0.1 and
the Shadow tuner of peft 0.21 hand the cache on by its old name."""


PROCESSES = (
    "tests/benchmarks/test_gpu.py",
    "tests/benchmarks/test_projection.py",
    "tests/cli/test_compare.py",
    "tests/cli/test_main.py::test_the_module_runs_as_a_program",
    "tests/cli/test_serve.py",
    "tests/cli/test_serve_load.py",
    "tests/cli/test_serve_vllm.py",
    "tests/comparison/test_execution.py",
    "tests/comparison/test_run.py",
    "tests/comparison/test_worker_process.py",
    "tests/examples/test_robot.py",
    "tests/export/test_card.py",
    "tests/export/test_detaching.py::test_it_loads_without_this_library_and_computes_what_detached_mode_does",
    "tests/fresh/",
    "tests/model/test_detached.py::test_saved_it_loads_without_this_library",
    "tests/model/test_files.py",
    "tests/model/test_loading.py::test_another_process_needs_only_the_import",
    "tests/serving/engine/test_failures.py::test_the_process_ends_with_an_error_code",
    "tests/serving/edge/test_llama_cpp_cloud.py",
    "tests/serving/http/test_clients.py",
    "tests/serving/http/test_server.py",
    "tests/test_models.py",
    "tests/test_provenance.py",
    "tests/test_public_api.py",
    "tests/test_readme.py",
    "tests/test_registration.py",
    "tests/training/test_distributed.py",
    "tests/training/test_pretraining.py::test_two_processes_pretrain_like_one_even_if_checkpointed",
    "tests/training/test_resume.py",
)
"""Tests, files and directories that start processes or servers of their own."""

BROWSER = (
    "tests/serving/page/",
    "tests/evaluation/test_report.py::test_the_page_fits_the_width_of_a_phone_and_its_tables_scroll_by_themselves",
)
"""Tests and directories that open a page in a browser."""


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


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if item.nodeid.startswith(PROCESSES):
            item.add_marker("process")
        if item.nodeid.startswith(BROWSER):
            item.add_marker("browser")
        if "smollm2" in item.fixturenames:
            item.add_marker("model")
        if _runs_others(item):
            item.add_marker(pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"))
