"""transformers' own ``ModelTesterMixin``, taken from the sdist of the installed version: a wheel has no tests.

The sdist lacks ``tests/generation`` and ``tests/exporters``; two empty classes stand in for the mixins that
``test_modeling_common.py`` imports from there. ``tests/model/test_generation_contract.py`` has checks of generation.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import pytest
import transformers

SDIST = "TRANSFORMERS_SDIST"
"""Environment variable: the sdist of the installed version, where it cannot be downloaded."""
PACKAGE = "transformers_own_tests"
STANDING_IN = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def model_tester_mixin(directory: Path) -> Any:
    """Return the class; skip the calling module if the sdist or a package that its tests need cannot be had.

    Args:
        directory: where the sdist is unpacked, and found again the next time.
    """
    pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
    tests = directory / f"transformers-{transformers.__version__}" / "tests"
    if not (tests / "test_modeling_common.py").is_file():
        with tarfile.open(_sdist(directory)) as archive:
            archive.extractall(directory, filter="data")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package
    for path, name in STANDING_IN.items():
        parent, module = path.split(".")
        sys.modules[f"{PACKAGE}.{parent}"] = types.ModuleType(parent)
        sys.modules[f"{PACKAGE}.{path}"] = stub = types.ModuleType(module)
        setattr(stub, name, type(name, (), {}))
    return importlib.import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin


def _sdist(directory: Path) -> Path:
    """Path of the sdist, downloaded by pip unless the environment names one."""
    if SDIST in os.environ:
        return Path(os.environ[SDIST])
    version = transformers.__version__
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers"]
    done = subprocess.run([*download, "-d", str(directory), f"transformers=={version}"], capture_output=True, text=True)
    found = sorted(directory.glob(f"transformers-{version}*.tar.gz"))
    if not found:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip downloaded nothing"]
        pytest.skip(f"no sdist of transformers {version}: {reason[0]}", allow_module_level=True)
    return found[0]
