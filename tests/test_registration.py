"""Importing the package is cheap, and transformers knows it whichever of the two comes first."""

import logging
import subprocess
import sys

import pytest

from shadowtune.registration import NOISY_LOGGERS, filter_import_warnings
from tests.support.shadows import perturbed_model


def python(code, *arguments):
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


HEAVY = ("torch", "transformers", "scipy", "sklearn")
LOADED = f"import sys; {{}}; print(*[name for name in {HEAVY} if name in sys.modules])"


@pytest.mark.parametrize(
    "what",
    [
        "import shadowtune",
        "from shadowtune.cli.main import main; main(['--help'])",
        "from shadowtune.cli.main import main; main(['trian', 'x'])",
        "from shadowtune.cli.main import main; main(['train', 'no.yaml'])",
        "from shadowtune.cli.main import main; main(['train', 'tiny_cpu', 'ranc=3'])",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(what):
    said = python(LOADED.format(what))
    assert not set(HEAVY) & set(said[-4:])


ORDERS = {
    "shadowtune first": "import shadowtune; from transformers import AutoModelForCausalLM, AutoConfig",
    "transformers first": "from transformers import AutoModelForCausalLM, AutoConfig; import shadowtune",
    "lazily": "import transformers, shadowtune; from transformers import AutoModelForCausalLM, AutoConfig",
    "a model class first": "import shadowtune; from transformers import PreTrainedModel; "
    "from transformers import AutoConfig, AutoModelForCausalLM",
    "generation first": "import shadowtune; from transformers import GenerationMixin, AutoConfig, AutoModelForCausalLM",
    "a submodule first": "import shadowtune; import transformers.modeling_utils; "
    "from transformers import AutoConfig, AutoModelForCausalLM",
    "the trainer first": "import shadowtune; from transformers import Trainer, AutoConfig, AutoModelForCausalLM",
    "config alone": "import shadowtune; from transformers import AutoConfig; import transformers as t; "
    "AutoModelForCausalLM = t.AutoModelForCausalLM",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_a_saved_shadow_opens_whichever_package_comes_first(tmp_path, imports):
    model = perturbed_model()
    model.base.save_pretrained(tmp_path / "base")
    model.config.base_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    code = (
        f"{imports}; import sys; print(AutoConfig.from_pretrained(sys.argv[1]).model_type);"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    assert python(code, str(tmp_path / "model"))[-2:] == ["shadow", "ShadowForCausalLM"]


def test_attach_is_the_function_also_after_its_subpackage_was_imported():
    modules = "shadowtune, shadowtune.attach.forward, shadowtune.model.modeling"
    code = f"import {modules}; print(type(shadowtune.attach).__name__)"
    assert python(code) == ["function"]
    assert python("import shadowtune; print(type(shadowtune.attach).__name__)") == ["function"]


@pytest.mark.parametrize("module", ["models", "compatibility", "attach.forward", "model.modeling"])
def test_any_module_may_be_imported_first(module):
    assert python(f"import shadowtune.{module}; from transformers import AutoModelForCausalLM; print('ok')") == ["ok"]


def test_public_names_are_there_and_others_are_not():
    code = (
        "import shadowtune; print(all(getattr(shadowtune, name) for name in shadowtune.__all__)); "
        "print(set(shadowtune.__all__) <= set(dir(shadowtune))); print(hasattr(shadowtune, 'nothing'))"
    )
    assert python(code)[-3:] == ["True", "True", "False"]


def test_importing_the_package_says_nothing():
    done = subprocess.run([sys.executable, "-c", "import shadowtune"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_bad_input_is_one_line_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "shadowtune", "train", "missing.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "shadowtune: error: cannot read missing.yaml: No such file or directory\n"


def test_levels_come_back():
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    before = [logger.level for logger in loggers]
    with filter_import_warnings():
        assert {logger.level for logger in loggers} == {logging.ERROR}
    assert [logger.level for logger in loggers] == before
