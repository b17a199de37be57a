"""Cache of the base's logits for pretraining, so that no training step has to run the base.

A file ``rows-00000256.safetensors`` covers the examples from index 256 on. It holds, for each labelled position, the k
most likely tokens (int32) and their log-probabilities (float32), 8 bytes per entry; its metadata name what they depend
on. A file is complete or absent, so an interrupted fill continues where it stopped.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors import SafetensorError, safe_open
from torch import nn

from shadowtune.config.training import TrainConfig
from shadowtune.core.losses import IGNORE_INDEX, TopTokens, shift_and_select, top_tokens
from shadowtune.data.collate import TEACHER_LOGITS
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.checkpoint import save_readable, tensor_checksum
from shadowtune.model.files import writing_into
from shadowtune.training.training_data import Collator, TrainingData

EXAMPLES_PER_FILE = 256
"""Also the number of examples that an interruption loses at most."""
STORED_DTYPES = (torch.int32, torch.float32)
LOADED_DTYPES = (torch.int64, torch.float32)


class TeacherLogitsDataset(Sequence[dict[str, Any]]):
    """Encoded examples with the teacher's logits from the cache, in the keys ``TEACHER_LOGITS`` of the collators.

    Args:
        examples: encoded.
        directory: of the cache.
        metadata: everything that the logits depend on beside the examples; files with other metadata are an error.
    """

    def __init__(
        self, examples: Sequence[Mapping[str, Any]], directory: str | Path, metadata: Mapping[str, str]
    ) -> None:
        self.examples = examples
        self.directory = Path(directory)
        own = {"rows": examples_fingerprint(examples), "rows_in_a_file": str(EXAMPLES_PER_FILE)}
        self.metadata = {**metadata, **own}
        self._ends = [0, *accumulate(len(_labelled_positions(example)) for example in examples)]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        """Return an example with "teacher_tokens" (T, k) int64 and "teacher_log_probabilities" (T, k) float32.

        They are 0 where the next token has no label.
        """
        index = range(len(self.examples))[index]
        example, first = self.examples[index], index - index % EXAMPLES_PER_FILE
        stored = slice(*(end - self._ends[first] for end in self._ends[index : index + 2]))
        logits = {}
        with safe_open(self._file(first), framework="pt") as content:
            for name, dtype in zip(TEACHER_LOGITS, LOADED_DTYPES, strict=True):
                part = content.get_slice(name)[stored]
                logits[name] = torch.zeros(len(example["labels"]), part.shape[1], dtype=dtype)
                logits[name][_labelled_positions(example)] = part.to(dtype)
        return {**example, **logits}

    @property
    def positions(self) -> int:
        """Number of labelled positions."""
        return self._ends[-1]

    def missing(self) -> Iterator[int]:
        """Yield the index of the first example of each missing file.

        Raises:
            ConfigError: if a file has other metadata.
            CheckpointError: if a file is damaged.
        """
        for first in range(0, len(self.examples), EXAMPLES_PER_FILE):
            file = self._file(first)
            if file.exists():
                self._check(file)
            else:
                yield first

    def examples_from(self, first: int) -> Sequence[Mapping[str, Any]]:
        """Return the examples of the file that begins with index ``first``."""
        return self.examples[first : first + EXAMPLES_PER_FILE]

    def write(self, first: int, top: TopTokens) -> None:
        """Write the file that begins with index ``first``; ``top`` is (labelled positions, k) of its examples.

        Raises:
            CheckpointError: if it cannot be written.
        """
        parts = zip(TEACHER_LOGITS, top, STORED_DTYPES, strict=True)
        tensors = {name: part.to("cpu", dtype) for name, part, dtype in parts}
        with writing_into(self.directory) as staging:
            save_readable(tensors, staging / self._file(first).name, self.metadata)

    def _file(self, first: int) -> Path:
        return self.directory / f"rows-{first:08d}.safetensors"

    def _check(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as content:
                found = content.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); delete it, and it will be made anew") from None
        wanted = self.metadata.items()
        others = [f"{name} {found.get(name)} and not {value}" for name, value in wanted if found.get(name) != value]
        if others:
            raise ConfigError(
                f"distillation_cache={self.directory} was filled for another run: it has {', '.join(others)}; "
                "name another directory, or delete this one"
            )


def with_teacher_logits(
    config: TrainConfig,
    model: nn.Module,
    data: TrainingData,
    accelerator: Accelerator,
    report: Callable[[str], None] = lambda line: None,
) -> TeacherLogitsDataset:
    """Return the training examples with the base's logits, after computing those that are not in the cache.

    Args:
        config: with ``distillation_cache``, the directory.
        model: in stage "pretrain", on its device.
        data: of the run.
        accelerator: of the trainer; its processes share the work.
        report: called with progress messages.

    Raises:
        ConfigError: if the directory belongs to another base, other examples or other settings.
        CheckpointError: if a file is damaged or cannot be written.
    """
    assert isinstance(model, ShadowForCausalLM) and config.distillation_cache is not None
    dataset = TeacherLogitsDataset(data.train, config.distillation_cache, _metadata(config, model))
    missing = list(dataset.missing())
    accelerator.wait_for_everyone()  # all have read the directory before the first one writes
    k = config.shadow.distillation_top_k
    report(
        f"teacher: the {k} most likely tokens at {dataset.positions:,} positions in {dataset.directory}, "
        + (f"{len(missing)} files of up to {EXAMPLES_PER_FILE} rows to be filled" if missing else "all known")
    )
    model.base.eval()
    for done, first in enumerate(missing, 1):
        if done % accelerator.num_processes == accelerator.process_index:
            with accelerator.autocast():
                examples = dataset.examples_from(first)
                dataset.write(first, _compute_logits(model, examples, data.collate, config.batch_size))
        if done * 10 // len(missing) > (done - 1) * 10 // len(missing):
            report(f"teacher: {done} of {len(missing)} files")
    accelerator.wait_for_everyone()
    if (lost := next(dataset.missing(), None)) is not None:
        raise CheckpointError(
            f"distillation_cache={dataset.directory} lacks the rows from {lost} on, which another process has written; "
            "name a directory that all machines share"
        )
    return dataset


def _metadata(config: TrainConfig, model: ShadowForCausalLM) -> dict[str, str]:
    """Return everything beside the examples that the base's logits depend on."""
    head = {name: tensor.cpu() for name, tensor in model.get_output_embeddings().named_parameters()}
    shadow = config.shadow
    return {
        "base": model.config.base_fingerprint
        or f"{config.model}@{config.revision}",  # a quantized base has no fingerprint
        "head": tensor_checksum(head)[:16],
        "base_dtype": config.base_dtype,
        "base_quantization": config.base_quantization,
        "autocast": str(config.autocast),
        "distillation_top_k": str(shadow.distillation_top_k),
        "distillation_temperature": str(shadow.distillation_temperature),
    }


@torch.no_grad()
def _compute_logits(model: ShadowForCausalLM, examples: Any, collate: Collator, batch_size: int) -> TopTokens:
    """Run the bare base; returns (labelled positions of all examples, k)."""
    weights = model.loss_weights()
    assert weights.top_k is not None
    parts = []
    for start in range(0, len(examples), batch_size):
        batch = send_to_device(collate(examples[start : start + batch_size]), model.device)
        labels = batch.pop("labels")
        _, hidden_states = shift_and_select(labels, model.base_states(**batch))
        parts.append(top_tokens(model.head, hidden_states, weights.top_k, weights.temperature))
    return TopTokens(*(torch.cat(each) for each in zip(*parts, strict=True)))


def examples_fingerprint(examples: Sequence[Mapping[str, Any]]) -> str:
    """Hash "input_ids" and "labels" (tokens, a class, or numbers) of encoded examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        for name in ("input_ids", "labels"):
            given = [example[name]] if isinstance(example[name], int | float) else example[name]
            values = array("d" if isinstance(given[0], float) else "i", given)
            digest.update(f"{len(values)}:".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()[:16]


def _labelled_positions(example: Mapping[str, Any]) -> list[int]:
    """Return the positions whose next token has a label."""
    return [position for position, label in enumerate(example["labels"][1:]) if label != IGNORE_INDEX]
