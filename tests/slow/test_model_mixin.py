"""Every test of transformers' ``ModelTesterMixin`` on both classes, three architectures and both modes, W_up not zero.

``explained_failures.yaml`` lists the tests whose assumption does not hold here, with the reason. A test that fails and
is not listed fails; so does one that is listed and passes.
"""

import contextlib
import fnmatch
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification, ShadowModelConfig
from tests.slow.transformers_mixins import model_tester_mixin
from tests.support.bases import VOCABULARY, WIDTH, tiny_base, tiny_classifier
from tests.support.shadows import perturb

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ARCHITECTURES = ("llama", "qwen3", "gemma3_text")
MODES = ("attached", "detached")
CACHE = Path(__file__).parent.parent.parent / ".pytest_cache" / "transformers-sdist"
EXPLAINED: dict[str, str] = yaml.safe_load((Path(__file__).parent / "explained_failures.yaml").read_text())


class _SavedWithItsBase:
    """Adapts the mixin's way of saving: it makes a model of a config alone, so the base must be saved beside it."""

    test_mode = "attached"

    def __init__(self, config: Any, base: Any = None, shadow: Any = None) -> None:
        super().__init__(config, base, shadow)  # type: ignore[call-arg]
        if base is None:
            perturb(self)  # type: ignore[arg-type]
        self.set_mode(self.test_mode)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return super().from_pretrained(*args, **{"mode": cls.test_mode, **kwargs})  # type: ignore[misc]

    def save_pretrained(self, directory: Any, *args: Any, **kwargs: Any) -> None:
        self.base.save_pretrained(Path(directory) / "base")  # type: ignore[attr-defined]
        self.config.base_name_or_path = str(Path(directory) / "base")  # type: ignore[attr-defined]
        super().save_pretrained(directory, *args, **kwargs)  # type: ignore[misc]


class _Tester:
    """What the mixin asks for: a config, and inputs that fit it."""

    is_training = True
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, num_attention_heads = WIDTH, 2, 4

    def __init__(self, kind: type, architecture: str) -> None:
        self.kind, self.architecture = kind, architecture
        if kind.test_mode == "detached":  # type: ignore[attr-defined]
            self.num_hidden_layers = 1
        self.sizes: dict[str, Any] = {"num_hidden_layers": 2}
        if architecture == "gemma3_text":
            self.sizes["layer_types"] = ["sliding_attention", "full_attention"]

    def prepare_config_and_inputs_for_common(self) -> Any:
        if issubclass(self.kind, ShadowForCausalLM):
            base = tiny_base(self.architecture, **self.sizes)
        else:
            base = tiny_classifier(self.architecture, **self.sizes)
        settings = ShadowConfig(rank=4, update_width=3, alpha=0.7, inject_first=self.architecture == "qwen3")
        config = self.kind.from_base(base, settings).config  # type: ignore[attr-defined]
        config.base_fingerprint = config.base_signature = None  # the mixin makes models of other random weights from it
        config = ShadowModelConfig.from_dict(config.to_dict())  # as it is read from a file, before there is a model
        ids = torch.randint(3, VOCABULARY, (self.batch_size, self.seq_length), generator=torch.manual_seed(0))
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prepare_config_and_inputs_for_model_class(self, model_class: Any) -> Any:
        return self.prepare_config_and_inputs_for_common()


def _case(mixin: Any, parent: type, architecture: str, mode: str) -> type[unittest.TestCase]:
    """A test class of one model class, architecture and mode."""
    kind = type(parent.__name__, (_SavedWithItsBase, parent), {"test_mode": mode, "__module__": parent.__module__})
    name = f"{parent.__name__}-{architecture}-{mode}"
    fields: dict[str, Any] = {
        "all_model_classes": (kind,),
        "setUp": lambda self: setattr(self, "model_tester", _Tester(kind, architecture)),
        "_prepare_for_class": _prepare_for_class,
        "__module__": __name__,
    }
    for test in dir(mixin):
        reasons = [text for pattern, text in EXPLAINED.items() if fnmatch.fnmatch(f"{name}::{test}", pattern)]
        if test.startswith("test_") and callable(getattr(mixin, test)) and reasons:
            fields[test] = pytest.mark.xfail(strict=True, reason=reasons[0])(_copy(getattr(mixin, test)))
    return type(name, (mixin, unittest.TestCase), fields)


def _prepare_for_class(self: Any, inputs: Any, model_class: Any, return_labels: bool = False) -> Any:
    """Copy inputs; labels, which the mixin adds to classes of transformers by their names."""
    inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    if return_labels:
        causal = issubclass(model_class, ShadowForCausalLM)
        inputs["labels"] = inputs["input_ids"].clone() if causal else torch.arange(len(inputs["input_ids"])) % 3
    return inputs


def _copy(function: Any) -> Any:
    def test(self: Any) -> None:
        self.subTest = lambda *args, **kwargs: contextlib.nullcontext()  # its failures are the test's
        function(self)

    return test


CACHE.mkdir(parents=True, exist_ok=True)
MIXIN = model_tester_mixin(CACHE)
for _parent in (ShadowForCausalLM, ShadowForSequenceClassification):
    for _architecture in ARCHITECTURES:
        for _mode in MODES:
            _made = _case(MIXIN, _parent, _architecture, _mode)
            globals()[_made.__name__] = _made


def test_every_explained_failure_is_of_a_test_that_exists():
    ids = [
        f"{parent.__name__}-{architecture}-{mode}::{test}"
        for parent in (ShadowForCausalLM, ShadowForSequenceClassification)
        for architecture in ARCHITECTURES
        for mode in MODES
        for test in dir(MIXIN)
    ]
    unknown = [pattern for pattern in EXPLAINED if not fnmatch.filter(ids, pattern)]
    assert not unknown
