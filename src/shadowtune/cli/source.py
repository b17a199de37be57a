"""Load the model that a command is given, whatever it is: a run, saved or exported files, or a Hub id."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shadowtune.cli.loading import is_run, shadow_tokenizer
from shadowtune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from shadowtune.evaluation.trained_model import ModelSource, TrainedModel
    from shadowtune.export.loading import LoadedModel
    from shadowtune.model.methods import Task

SOURCE = (
    "a run directory, a saved shadow or adapter, a detached or any transformers directory, an ONNX directory or "
    "file, a GGUF file, or a Hub id"
)
"""Help of the argument of commands that take any model."""
Quantization = Literal["none", "int8", "int4", "nf4"]


def source_path(name: str) -> Path:
    """Return the path of a model: itself if it exists, else the directory of a short name or of a Hub id.

    Raises:
        CheckpointError: if there is no such model.
    """
    from shadowtune.model.hub import download_model, is_hub_id
    from shadowtune.models import NAMED, resolve

    path = Path(name)
    if path.exists():
        return path
    if name in NAMED:
        return Path(resolve(name))
    if not is_hub_id(name) or path.parent.is_dir():
        raise CheckpointError(f"there is no {name}: name {SOURCE}")
    return download_model(name)


def last_change(name: str) -> int:
    """Return the latest modification time of a model's files, in nanoseconds; ``name`` as for ``open_source``."""
    path = source_path(name)
    files = path / "model" if is_run(path) else path
    return max((file.stat().st_mtime_ns for file in files.rglob("*")), default=files.stat().st_mtime_ns)


def open_source(
    name: str,
    check_base_weights: bool = True,
    quantization: Quantization | None = None,
    max_length: int | None = None,
) -> "TrainedModel":
    """Load a model from what a command is given.

    Args:
        name: a path, a short name of ``shadowtune.models``, or a Hub id.
        check_base_weights: whether to refuse a base whose weights differ from those in training.
        quantization: of the base, of runs and saved shadows; by default that of training.
        max_length: tokens of prompt and answer together that memory is reserved for, of a GGUF file.

    Raises:
        CheckpointError: if it is no model, or its files are damaged.
        ConfigError: if its weights cannot be quantized.
    """
    from shadowtune.evaluation.run import FinishedRun

    path = source_path(name)
    if is_run(path):
        return FinishedRun.open(path, check_base_weights, quantization)
    if path.is_dir() and _is_shadow(path):
        return _open_shadow(name, path, check_base_weights, quantization)
    if quantization is not None:
        raise ConfigError(
            f"--quantization is of the base of a run or saved shadow, and {name} is neither; leave it out"
        )
    if (path / "adapter_config.json").is_file():
        return _open_adapter(name, path)
    return _open_plain(name, path, max_length)


def detached_model(source: "TrainedModel") -> "LoadedModel":
    """Return a model that runs without a base: the detached shadow, or a model that has no other mode as it is.

    Raises:
        ConfigError: if it is a classifier, or an adapter that needs its base.
    """
    from shadowtune.export.loading import LoadedModel, wrap_model

    source.check_generates()
    if isinstance(source.model, LoadedModel):
        return source.model
    if source.drafts:
        from shadowtune.export.deferral import folded_head
        from shadowtune.model.deferral_files import read_deferral_head

        path = source_path(source.source.name)
        saved = folded_head(read_deferral_head(path / "model" if is_run(path) else path), source.model.shadow)
        head = None if saved is None else saved.head
        return wrap_model(source.model.detached(), source.tokenizer, source.prompt_format, head)
    if len(source.modes) > 1:
        raise ConfigError(f"{source.source.name} is {source.source.kind}; only a shadow runs without its base")
    return wrap_model(source.model, source.tokenizer, source.prompt_format)


def _is_shadow(path: Path) -> bool:
    """Whether a directory holds a shadow: ours, shadow-peft's or PEFT's."""
    if (path / "adapter_config.json").is_file():
        return bool(_config_of(path, "adapter_config.json").get("peft_type") == "SHADOW")
    if (path / "shadow_config.json").is_file():
        return True
    return (path / "config.json").is_file() and _config_of(path, "config.json").get("model_type") == "shadow"


def _config_of(path: Path, file: str) -> dict[str, Any]:
    """Read a JSON object of a model's directory; raises CheckpointError."""
    try:
        values = json.loads((path / file).read_text())
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"cannot read a model from {path}: {file} is damaged")
    return values


def _open_shadow(name: str, path: Path, check_base_weights: bool, quantization: Quantization | None) -> "TrainedModel":
    import torch

    from shadowtune.evaluation.run import MODES
    from shadowtune.evaluation.trained_model import ModelSource
    from shadowtune.model.loading import open_third_party, read_config
    from shadowtune.model.methods import SHADOW_CLASSES
    from shadowtune.model.quantization import quantization_arguments

    other = open_third_party(str(path))
    architectures = [] if other is not None else read_config(str(path)).architectures or []
    task = _task_of(architectures if other is None else ["SequenceClassification"] * other.classifies)
    loading = quantization_arguments(quantization or "none", torch.float32)
    model = SHADOW_CLASSES[task].from_pretrained(str(path), check_base_weights=check_base_weights, **loading)
    kind = "a saved shadow" if task == "causal_lm" else "a saved shadow of a classifier"
    tokenizer = shadow_tokenizer(path, model.config.base_name_or_path or "")
    return _saved(ModelSource(name, kind, task, MODES["shadow"]), path, model, tokenizer)


def _task_of(architectures: list[Any]) -> "Task":
    classifies = any("SequenceClassification" in str(each) for each in architectures)
    return "classification" if classifies else "causal_lm"


def _open_adapter(name: str, path: Path) -> "TrainedModel":
    """Load an adapter of PEFT on the base that it names."""
    from shadowtune.evaluation.run import MODES
    from shadowtune.evaluation.trained_model import ModelSource
    from shadowtune.model.methods import PEFT_TASK_TYPES, load_trained

    config = _config_of(path, "adapter_config.json")
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    tasks: dict[Any, Any] = {theirs: ours for ours, theirs in PEFT_TASK_TYPES.items()}
    if not base or config.get("task_type") not in tasks:
        raise CheckpointError(
            f"{name} is an adapter of PEFT ({kind}) that names no base, or a task other than {', '.join(tasks)}: "
            f"base_model_name_or_path is {base!r}, task_type {config.get('task_type')!r}"
        )
    origin = ModelSource(name, f"an adapter of PEFT ({kind})", tasks[config["task_type"]], MODES["peft"])
    return _saved(origin, path, load_trained(path, "peft", origin.task, base), shadow_tokenizer(path, base))


def _open_plain(name: str, path: Path, max_length: int | None) -> "TrainedModel":
    """Load a file, or a directory of transformers or ONNX."""
    import torch

    from shadowtune.data.chat_template import has_prompt_format
    from shadowtune.evaluation.trained_model import ModelSource, SavedModel
    from shadowtune.export.exporting import read_tokenizer
    from shadowtune.export.loading import load_model
    from shadowtune.model.methods import load_base

    file = path if path.is_file() else path / "model.onnx"
    if file.is_file():
        onnx = file.suffix == ".onnx"
        opened = load_model(file.parent if onnx else file, max_length)
        origin = ModelSource(name, "an ONNX model" if onnx else "a GGUF file", "causal_lm", ("detached",))
        return SavedModel(origin, opened, opened.tokenizer, opened.prompt_format)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no model: it has no config.yaml, config.json or adapter_config.json")
    task = _task_of(_config_of(path, "config.json").get("architectures") or [])
    precision = {} if torch.accelerator.is_available() else {"dtype": torch.float32}
    model = load_base(str(path), task, **precision).eval()
    detached = has_prompt_format(path)  # else nothing was trained here
    kind = ("a detached" if detached else "a plain") + (" model" if task == "causal_lm" else " classifier")
    origin = ModelSource(name, kind, task, ("detached",) if detached else ("base",))
    return _saved(origin, path, model, read_tokenizer(str(path)))


def _saved(origin: "ModelSource", path: Path, model: Any, tokenizer: Any) -> "TrainedModel":
    """Return a model of torch, on the accelerator if there is one, with the prompt format beside it."""
    import torch

    from shadowtune.data.prompt_format import PromptFormat
    from shadowtune.evaluation.trained_model import SavedModel

    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return SavedModel(origin, model, tokenizer, PromptFormat.load(path))
