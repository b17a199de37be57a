"""The directory of one training run, and the digests that a resumption compares.

config.yaml         the resolved settings           environment.json   commit, versions, hardware, date
inputs.json         digests of base, tokenizer and data
metrics.jsonl       one line per log step           checkpoints/       for --resume
samples.jsonl       sample answers of evaluations   report.html        all of it on one page
model/              the trained model               summary.json       the costs; exists once the run has finished
tensorboard/        the same metrics for TensorBoard
shadow/             run directory of the shadow-only stage          lora/    of the LoRA part of an ensemble
drafting/           metrics of the draft head stage
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from shadowtune.attach.sharding import whole_tensor
from shadowtune.config.loading import dump_config, load_config
from shadowtune.config.training import TrainConfig
from shadowtune.errors import CheckpointError, ConfigError, TrainingError
from shadowtune.model.files import recover_directory, writing_into
from shadowtune.provenance import provenance
from shadowtune.training.checkpoints import check_checkpoint
from shadowtune.training.teacher_logits import examples_fingerprint
from shadowtune.training.training_data import TrainingData

SHADOW_DIRECTORY = "shadow"
LORA_DIRECTORY = "lora"
DISTILLATION_DIRECTORY = "distillation"
DRAFT_HEAD_DIRECTORY = "drafting"
DIGESTS_FILE = "inputs.json"
REPORTING = (
    "output",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "keep_checkpoints",
    "samples",
    "report_to",
    "tensorboard",
)
"""Settings that do not change what a run learns: where it is, what it reports and how often."""
MAY_CHANGE = (*REPORTING, "epochs", "max_steps")
"""Settings of a resumed run that may differ from those of the interrupted one; ``eval_steps`` only if no evaluations
are compared."""
DESCRIPTIONS = {
    "base": "the base's weights or config",
    "tokenizer": "the tokenizer",
    "train": "the training rows",
    "validation": "the validation rows",
}
"""Fields of ``InputDigests`` in error messages."""


@dataclass(frozen=True)
class InputDigests:
    """SHA-256 digests of what a run learns from: files may change while the settings stay the same."""

    base: str
    """Config and weights as loaded, before training."""
    tokenizer: str
    """Vocabulary, rules, special tokens and chat template."""
    train: str
    """Encoded training examples in their order."""
    validation: str | None
    """Encoded validation examples; None without any."""

    @classmethod
    def of(cls, base: PreTrainedModel, data: TrainingData) -> "InputDigests":
        """Compute the digests of a base, of the data and of its tokenizer."""
        validation = None if data.validation is None else examples_fingerprint(data.validation)
        return cls(base_digest(base), tokenizer_digest(data.tokenizer), examples_fingerprint(data.train), validation)

    def described(self) -> dict[str, str | None]:
        """Return the digests by their names in error messages."""
        return {words: asdict(self)[name] for name, words in DESCRIPTIONS.items()}

    def save(self, directory: Path) -> None:
        """Write ``inputs.json`` into a run directory; raises CheckpointError if that fails."""
        with writing_into(directory) as staging:
            (staging / DIGESTS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def check(self, directory: Path) -> None:
        """Compare with the digests in a run directory.

        Raises:
            ConfigError: naming what has changed.
            CheckpointError: if the file is missing or damaged.
        """
        file = directory / DIGESTS_FILE
        try:
            recorded: Any = json.loads(file.read_text())
            changed = [words for name, words in DESCRIPTIONS.items() if recorded[name] != asdict(self)[name]]
        except FileNotFoundError:
            raise CheckpointError(
                f"cannot resume {directory}: it has no {DIGESTS_FILE}, so what it was trained on is unknown; start anew"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"cannot resume {directory}: {file} is damaged ({error!r})") from None
        if DESCRIPTIONS["tokenizer"] in changed:  # which changes the encoded examples as well
            changed = [words for words in changed if not words.endswith("rows")]
        if changed:
            raise ConfigError(
                f"cannot resume {directory}: since it began, {' and '.join(changed)} changed; put back what was there, "
                "or start anew"
            )


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.summary_file = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.tensorboard = self.path / "tensorboard"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context that creates the directory and locks it against other runs.

        Raises:
            TrainingError: if the directory cannot be created, or another run holds the lock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock").acquire(timeout=0)
        except Timeout:
            raise TrainingError(
                f"another process is training in {self.path}; wait for it or choose another output=..."
            ) from None
        except OSError as error:
            raise TrainingError(f"cannot write to the run directory {self.path}: {error.strerror}") from None
        with lock:
            yield

    def check(self, config: TrainConfig, resume: bool, overwrite: bool) -> None:
        """Check that a run may start or resume here.

        Raises:
            TrainingError: if there is a run already, and neither ``resume`` nor ``overwrite``.
            ConfigError: if the run to resume has other settings.
            CheckpointError: if the checkpoint to resume from is damaged.
        """
        recover_directory(self.model)
        if overwrite or not (self.config_file.exists() or self.last_checkpoint()):
            return
        if not resume:
            raise TrainingError(f"{self.path} holds a run already; pass --resume, --overwrite or another output=...")
        before, now = vars(self.read_config()), vars(config)
        fixed = set(now) - set(MAY_CHANGE) | ({"eval_steps"} if config.compares_losses else set())
        changed = [name for name in now if name in fixed and before[name] != now[name]]
        if changed:
            raise ConfigError(
                f"cannot resume {self.path} with other settings: {', '.join(changed)} changed; start a new output=..."
            )
        if (last := self.last_checkpoint()) is not None:
            check_checkpoint(Path(last))
        elif self.summary_file.is_file() and before["keep_checkpoints"] == 0:
            raise CheckpointError(
                f"cannot resume {self.path}: it has finished and kept no checkpoint (keep_checkpoints=0); start a new "
                "output=..."
            )

    def check_inputs(self, digests: InputDigests) -> None:
        """Check that data, base and tokenizer are those that this run, or its shadow-only stage, began with.

        Raises:
            ConfigError: naming what has changed.
            CheckpointError: if the recorded digests are missing or damaged.
        """
        if self.last_checkpoint() is not None:
            digests.check(self.path)
        shadow_only = RunDirectory(self.path / SHADOW_DIRECTORY)
        if shadow_only.last_checkpoint() is not None or shadow_only.model.is_dir():
            digests.check(shadow_only.path)

    def begin(self, config: TrainConfig, resume: bool) -> None:
        """Write the settings and the environment; unless resuming, remove the files of an earlier run.

        Raises:
            ShadowtuneError: if a file cannot be written or removed.
        """
        try:
            if not resume:
                for directory in (self.checkpoints, self.model, self.tensorboard):
                    if directory.exists():
                        shutil.rmtree(directory)
            if self.last_checkpoint() is None:
                self.metrics_file.unlink(missing_ok=True)
                self.samples_file.unlink(missing_ok=True)
            for file in (self.summary_file, self.path / "report.html"):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot clear the run directory {self.path}: {error}") from None
        dump_config(config, self.config_file)
        with writing_into(self.path) as staging:
            (staging / self.environment_file.name).write_text(json.dumps(provenance(), indent=2) + "\n")

    def last_checkpoint(self) -> str | None:
        """Return the latest checkpoint, or None."""
        return get_last_checkpoint(str(self.checkpoints)) if self.checkpoints.is_dir() else None

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints of a finished run."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def is_finished(self, config: TrainConfig) -> bool:
        """Whether a run with these settings, those in ``REPORTING`` aside, has finished here."""
        recover_directory(self.model)
        if not (self.summary_file.is_file() and self.config_file.is_file() and self.model.is_dir()):
            return False
        before = self.read_config()
        if config.compares_losses and before.eval_steps != config.eval_steps:
            return False
        return replace(before, **{name: vars(config)[name] for name in REPORTING}) == config

    def read_config(self) -> TrainConfig:
        """Return the resolved settings of the run; raises CheckpointError if there is no run here."""
        if not self.config_file.is_file():
            raise CheckpointError(f"{self.path} is not a run directory: it has no config.yaml")
        return load_config(TrainConfig, self.config_file, [])


@torch.no_grad()
def base_digest(base: PreTrainedModel) -> str:
    """SHA-256 of a model's config, and of the name, shape, dtype and bytes of each weight."""
    settings = {name: value for name, value in base.config.to_diff_dict().items() if name != "transformers_version"}
    for name in ("_name_or_path", "distributed_config"):  # where the weights are
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in base.state_dict(keep_vars=True).items():
        for part in _plain_tensors(whole_tensor(tensor)):
            digest.update(f"{name}:{tuple(part.shape)}:{part.dtype}:".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides how texts and conversations become tokens."""
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
    """Yield the tensors that store a tensor: itself, or several of a quantized one."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_tensors(vars(tensor)[name])
