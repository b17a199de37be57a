"""Digests of what a run learns from, recorded when it begins and compared when it is resumed."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import writing_into
from shadowtune.training.rows import TrainingRows
from shadowtune.training.teacher_cache import rows_fingerprint

FILE = "inputs.json"
NAMES = {
    "base": "the base's weights or config",
    "tokenizer": "the tokenizer",
    "train": "the training rows",
    "validation": "the validation rows",
}
"""Fields of ``TrainingInputs`` in words."""


@dataclass(frozen=True)
class TrainingInputs:
    """What a run learns from, as SHA-256 digests: under equal settings, files may have changed."""

    base: str
    """Config and weights as they are loaded, before anything is trained."""
    tokenizer: str
    """Its vocabulary, rules, special tokens and chat template."""
    train: str
    """The encoded training rows in their order."""
    validation: str | None
    """The encoded validation rows; None without any."""

    @classmethod
    def of(cls, base: PreTrainedModel, rows: TrainingRows) -> "TrainingInputs":
        """Compute the digests of a base that is just loaded, of the rows and of their tokenizer."""
        validation = None if rows.validation is None else rows_fingerprint(rows.validation)
        return cls(base_digest(base), tokenizer_digest(rows.tokenizer), rows_fingerprint(rows.train), validation)

    def save(self, directory: Path) -> None:
        """Write ``inputs.json`` into a run directory; raises CheckpointError if that cannot be done."""
        with writing_into(directory) as staging:
            (staging / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def check(self, directory: Path) -> None:
        """Compare with what was recorded when a run began.

        Raises:
            ConfigError: naming what has changed.
            CheckpointError: if nothing was recorded, or it cannot be read.
        """
        file = directory / FILE
        try:
            recorded: Any = json.loads(file.read_text())
            changed = [words for name, words in NAMES.items() if recorded[name] != asdict(self)[name]]
        except FileNotFoundError:
            raise CheckpointError(
                f"cannot resume {directory}: it has no {FILE}, so what it was trained on is unknown; start anew"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"cannot resume {directory}: {file} is damaged ({error!r})") from None
        if NAMES["tokenizer"] in changed:  # which changes the encoded rows as well
            changed = [words for words in changed if not words.endswith("rows")]
        if changed:
            raise ConfigError(
                f"cannot resume {directory}: since it began, {' and '.join(changed)} changed; put back what was there, "
                "or start anew"
            )


@torch.no_grad()
def base_digest(base: PreTrainedModel) -> str:
    """Hash a model's config, and the name, shape, dtype and bytes of each of its weights."""
    settings = {name: value for name, value in base.config.to_diff_dict().items() if name != "transformers_version"}
    settings.pop("_name_or_path", None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in base.state_dict().items():
        for part in _plain_tensors(tensor):
            digest.update(f"{name}:{tuple(part.shape)}:{part.dtype}:".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides how texts and conversations become tokens."""
    if tokenizer.is_fast:
        backend: Any = tokenizer
        rules = json.loads(backend.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # of the last call
            rules.pop(state, None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    known = {
        "rules": rules,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the numbers of one, which for quantized weights are several."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_tensors(vars(tensor)[name])
