import subprocess
import sys

import shadowtune


def test_every_public_name_exists_and_is_sorted():
    assert sorted(shadowtune.__all__, key=str.lower) == sorted(set(shadowtune.__all__), key=str.lower)
    for name in shadowtune.__all__:
        assert getattr(shadowtune, name) is not None


def test_import_registers_the_model_type_and_prints_nothing():
    code = "import shadowtune; from transformers import AutoConfig; print(AutoConfig.for_model('shadow').model_type)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "shadow"
