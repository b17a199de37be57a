"""Diagnosis of a run or a saved shadow: what it was trained on, where its answers end, and whether all forms agree.

Each check gives a ``Finding``. The logits of the attached model in one pass, as in training, are compared with those of
the serving engine, and those of detached mode with the plain model and with exported files.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer

from shadowtune.config.training import TrainConfig
from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.data.chat_template import load_tokenizer_and_format
from shadowtune.data.dataset import Dataset
from shadowtune.data.encoding import EncodingReport
from shadowtune.data.examples import user_message
from shadowtune.data.generation import configured_ends
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError, ConfigError, DataError, ShadowtuneError
from shadowtune.evaluation.run import FinishedRun, read_run_config
from shadowtune.export.detaching import built_in_prompts
from shadowtune.export.loading import load_model
from shadowtune.model.loading import has_weights, read_config
from shadowtune.model.methods import SHADOW_CLASSES
from shadowtune.model.modeling import ShadowPreTrainedModel
from shadowtune.models import resolve
from shadowtune.provenance import provenance
from shadowtune.serving.engine.adapter import Adapter
from shadowtune.serving.engine.model_runner import ModelRunner
from shadowtune.serving.engine.sequence import Sampler, TokenizedRequest
from shadowtune.serving.engine.sequence import Sequence as Decoded
from shadowtune.serving.requests import GenerationRequest
from shadowtune.versions import untested_versions

Status = Literal["ok", "warning", "problem"]
EXACT, LOOSE = 1e-3, 0.05
"""Largest difference of logits, of their standard deviation: in float32, and in less precision."""
PROBE = "What is the capital of France?"
"""Message of the rendered chat."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    check: str
    status: Status
    text: str


@dataclass
class Diagnosis:
    """Results of all checks."""

    findings: list[Finding] = field(default_factory=list)
    samples: list[list[tuple[str, bool]]] = field(default_factory=list)
    """The tokens of some training examples, each with whether it is a training target."""
    chat: str | None = None
    """The prompt that a chat client makes of one message; None without a chat template."""

    def add(self, check: str, status: Status, text: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(check, status, text))

    def add_if(self, good: bool, check: str, text: str, otherwise: str) -> None:
        """Add ``text`` as ok, or ``otherwise`` as a problem."""
        self.add(check, "ok" if good else "problem", text if good else otherwise)


def diagnose(path: str | Path, against: Sequence[str] = (), samples: int = 3) -> Diagnosis:
    """Check a run directory or a saved shadow.

    Args:
        path: of the run or shadow; its base is loaded.
        against: exported files and directories whose logits are compared; those beside ``path`` are found by their
            default names.
        samples: training examples whose masks are shown and checked.

    Raises:
        CheckpointError: if it is neither, or cannot be loaded.
        ConfigError: if it is a run of a method without a shadow.
    """
    path = Path(path)
    config = read_run_config(path) if (path / "config.yaml").is_file() else None
    if config is not None and not config.leaves_shadow:
        raise ConfigError(f"{path} is a {config.method} run; doctor checks runs and adapters with a shadow")
    model, tokenizer, directory = _load(path, config)
    form, found = PromptFormat.load(directory), Diagnosis()
    _check_versions(found, path)
    _check_base(found, model, directory)
    _check_weights(found, model)
    if config is not None:
        _check_masks(found, config, tokenizer, form, samples)
    else:
        found.add("masks", "warning", "a saved shadow does not name its training data; doctor RUN shows the masks")
    if not model.can_generate():
        return found
    _check_ends(found, model, tokenizer, form)
    prompts = built_in_prompts(tokenizer)
    _check_forms(found, model, tokenizer, prompts)
    for file in [*map(Path, against), *_exports_beside(path, against)]:
        _check_export(found, model, file, prompts)
    _check_chat(found, directory, tokenizer, form)
    return found


def _load(path: Path, config: TrainConfig | None) -> tuple[Any, Any, Path]:
    """Load the model without the check of its base; return it with its tokenizer and directory."""
    if config is not None:
        finished = FinishedRun.open(path, check_base_weights=False)
        return finished.model.eval(), finished.tokenizer, path / "model"
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; name a run of shadowtune train or a saved shadow")
    stored = read_config(str(path))
    classifies = any("SequenceClassification" in name for name in stored.architectures or [])
    kind = SHADOW_CLASSES["classification" if classifies else "causal_lm"]
    model = kind.from_pretrained(str(path), check_base_weights=False)
    own = (path / "tokenizer_config.json").is_file()
    source = str(path) if own else str(resolve(stored.base_name_or_path or ""))
    return model.eval(), load_tokenizer_and_format(source)[0], path


def _check_versions(found: Diagnosis, path: Path) -> None:
    now, untested = provenance()["versions"], untested_versions()
    text = ", ".join(f"{name} {version}" for name, version in now.items() if name in ("torch", "transformers"))
    try:
        then = json.loads((path / "environment.json").read_text())["versions"]
    except (OSError, ValueError, KeyError):
        then = {}
    changed = [f"{name} {then[name]} in training" for name in then if now.get(name) not in (None, then[name])]
    if untested:
        found.add("versions", "warning", "; ".join(f"{name} {why}" for name, why in untested.items()))
    elif changed:
        found.add("versions", "warning", f"{text}; {', '.join(changed)}")
    else:
        found.add("versions", "ok", text)


def _check_base(found: Diagnosis, model: ShadowPreTrainedModel, directory: Path) -> None:
    try:
        stored = read_config(str(directory))
    except CheckpointError:  # an adapter of another library, which describes no weights
        found.add("base", "warning", "the adapter does not say which weights its base had")
        return
    name = stored.base_name_or_path or "the base"
    if stored.base_signature is None and stored.base_fingerprint is None:
        found.add("base", "warning", f"{name} was quantized when the shadow was made, so its weights are not known")
        return
    wrong = f"{name} has other weights than in training: answers will be worse without any error"
    found.add_if(has_weights(model.base, stored), "base", f"{name}, fingerprint {stored.base_fingerprint}", wrong)


def _check_weights(found: Diagnosis, model: ShadowPreTrainedModel) -> None:
    head: Any = model.base.get_output_embeddings()
    if head is not None:
        embedding: Any = model.base.get_input_embeddings()
        stated, tied = model.base.config.get_text_config().tie_word_embeddings, head.weight is embedding.weight
        same = tied or (stated and bool(torch.equal(head.weight, embedding.weight)))
        text = "head and embedding are one matrix" if tied else "head and embedding are two matrices, as stated"
        wrong = "the base's config says tie_word_embeddings, but its head is another matrix"
        found.add_if(same or not stated, "tied weights", text, wrong)
    broken = [name for name, weight in model.shadow.named_parameters() if not bool(weight.isfinite().all())]
    wrong = f"NaN or infinite: {', '.join(broken[:3])}; load an earlier checkpoint"
    found.add_if(not broken, "finite weights", "no weight of the shadow is NaN or infinite", wrong)
    if not bool(model.shadow.boundaries.injection_ups.any()):
        found.add("boundaries", "warning", "W_up is 0 everywhere: the attached model equals its base (not trained?)")


def _check_masks(found: Diagnosis, config: TrainConfig, tokenizer: Any, form: PromptFormat, samples: int) -> None:
    """Encode the first training examples as training does."""
    try:
        data = Dataset.open(config.data)
        rows = data.training_rows()[:samples]
        encoded, report = data.encode(rows, tokenizer, config.task == "classification", training=True)
    except DataError as error:
        found.add("masks", "warning", f"the training data cannot be read any more: {error}")
        return
    if config.task == "classification":
        found.add("masks", "ok", f"{len(encoded)} texts with a class each")
        return
    for example in encoded:
        tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
        learned = [label != IGNORE_INDEX for label in example["labels"]]
        found.samples.append(list(zip(tokens, learned, strict=True)))
    empty = sum(not any(learned for _, learned in sample) for sample in found.samples)
    tokens = sum(map(len, found.samples))
    targets = sum(learned for sample in found.samples for _, learned in sample)
    text = f"{targets} of {tokens} tokens of {len(encoded)} examples are learned"
    found.add_if(not empty, "masks", text, f"{empty} of {len(encoded)} examples have no learned token")
    if not isinstance(report, EncodingReport) or not form.answers:
        return
    last = [max(i for i, label in enumerate(each["labels"]) if label != IGNORE_INDEX) for each in encoded]
    ended = sum(each["labels"][i] in form.ends for each, i in zip(encoded, last, strict=True))
    wrong = f"{len(encoded) - ended} of {len(encoded)} answers end in no recorded end token: generation may not stop"
    found.add_if(ended == len(encoded), "learned ends", f"all {ended} answers end in a learned end token", wrong)


def _check_ends(found: Diagnosis, model: Any, tokenizer: Any, form: PromptFormat) -> None:
    configured = configured_ends(model.generation_config)
    names = ", ".join(tokenizer.convert_ids_to_tokens(list(form.ends or configured)))
    missing = [token for token in form.ends if token not in configured]
    if not configured and not form.ends:
        found.add("ends", "problem", "neither prompt_format.json nor generation_config.json has an end token")
    elif missing:
        lost = ", ".join(tokenizer.convert_ids_to_tokens(missing))
        found.add("ends", "problem", f"generation_config.json lacks {lost}, in which the training answers ended")
    else:
        found.add("ends", "ok", f"answers end in {names}")


def _check_forms(found: Diagnosis, model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> None:
    """Compare one pass with the serving engine, and detached mode with the plain model."""
    attached = [_logits(model.set_mode("attached"), prompt) for prompt in prompts]
    limit = EXACT if all(each.dtype is torch.float32 for each in model.parameters()) else LOOSE
    try:
        engine = [_engine_logits(model, tokenizer, prompt) for prompt in prompts]
        _compare(found, "serving", attached, engine, limit, "one pass as in training and the serving engine")
    except ShadowtuneError as error:
        found.add("serving", "warning", f"not served: {error}")
    try:
        plain = model.detached()
    except ShadowtuneError as error:
        found.add("detached", "warning", str(error))
        return
    alone = [_logits(model.set_mode("detached"), prompt) for prompt in prompts]
    model.set_mode("attached")
    _compare(found, "detached", alone, [_logits(plain, prompt) for prompt in prompts], limit, "detached mode and files")


def _check_export(found: Diagnosis, model: Any, file: Path, prompts: Sequence[list[int]]) -> None:
    loaded = load_model(file)
    expected = [_logits(model.set_mode("detached"), prompt) for prompt in prompts]
    model.set_mode("attached")
    exported = [loaded.runtime.logits(prompt) for prompt in prompts]
    check = f"export {file.name}"
    if any(one.shape != other.shape for one, other in zip(expected, exported, strict=True)):
        found.add(check, "problem", f"its vocabulary has {exported[0].size} tokens, not {expected[0].size}")
        return
    distance = max(_distance(one, other) for one, other in zip(expected, exported, strict=True))
    equal = sum(one.argmax() == other.argmax() for one, other in zip(expected, exported, strict=True))
    text = f"logits differ by {distance:.2g} of their deviation, {equal} of {len(prompts)} likeliest tokens are equal"
    status: Status = "ok" if distance <= LOOSE else "warning" if equal > len(prompts) / 2 else "problem"
    found.add(check, status, text + ("" if status == "ok" else "; quantized, or of another training?"))


def _check_chat(found: Diagnosis, directory: Path, tokenizer: Any, form: PromptFormat) -> None:
    """Render a message as a client of the saved tokenizer does, and compare it with the prompts of training."""
    if not (directory / "tokenizer_config.json").is_file():
        found.add("chat client", "warning", "no tokenizer is saved here; clients use the base's")
        return
    saved: Any = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    if saved.chat_template is None:
        found.add("chat client", "warning", "the tokenizer has no chat template: clients must send whole prompts")
        return
    fields = {name: name for name in form.further_fields if name not in form.optional_fields}
    try:
        rendered = saved.apply_chat_template(
            [dict(user_message(PROBE))], tokenize=False, add_generation_prompt=True, **fields
        )
        ours = form.encode([user_message(PROBE)], tokenizer, fields=fields)
    except (DataError, TemplateError) as error:
        found.add("chat client", "problem", f"the chat template refuses a message: {' '.join(str(error).split())}")
        return
    found.chat = str(rendered)
    sent = saved(found.chat, add_special_tokens=False)["input_ids"]
    wrong = f"a client's prompt differs from those of training, which are {tokenizer.decode(ours)!r}"
    found.add_if(sent == ours, "chat client", f"sends the prompts of training, {len(ours)} tokens", wrong)


def _exports_beside(path: Path, against: Sequence[str]) -> list[Path]:
    """Return exports with the names that ``shadowtune export`` gives by default."""
    known, absolute = {Path(name).absolute() for name in against}, path.absolute()
    beside = sorted(each for each in absolute.parent.glob(f"{absolute.name}-*") if each not in known)
    return [each for each in beside if each.suffix == ".gguf" or _is_plain(each)]


def _is_plain(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / "config.json").read_text())["model_type"] != "shadow")
    except (OSError, ValueError, KeyError):
        return False


@torch.inference_mode()
def _logits(model: Any, prompt: list[int]) -> np.ndarray:
    """Return the logits (V,) after a prompt, in one pass without a cache."""
    ids = torch.tensor([prompt], device=model.device)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    values: np.ndarray = output.logits[0, -1].float().cpu().numpy()
    return values


@torch.inference_mode()
def _engine_logits(model: Any, tokenizer: Any, prompt: list[int]) -> np.ndarray:
    """Return the logits (V,) after a prompt of which the engine reads half at once and the rest token by token."""
    runner, adapter = ModelRunner(model.base), Adapter("checked", model, None, model.base, None)
    request = GenerationRequest("checked", prompt=prompt)
    sampler = Sampler(request, len(prompt), frozenset(), model.device)
    tokenized, length, ends = TokenizedRequest(prompt, []), len(prompt) + 1, frozenset[int]()
    decoded = Decoded(request, adapter, tokenized, length, ends, sampler, tokenizer, lambda item: None)
    runner.add(decoded)
    half = max(1, len(prompt) // 2)
    for part in (prompt[:half], *([token] for token in prompt[half:])):
        states = runner.run([decoded], [part])
        decoded.cached += len(part)
    adapter.close()
    values: np.ndarray = runner.head(states.last[0, -1]).float().cpu().numpy()
    return values


def _compare(
    found: Diagnosis, check: str, one: Sequence[np.ndarray], other: Sequence[np.ndarray], limit: float, what: str
) -> None:
    distance = max(_distance(*pair) for pair in zip(one, other, strict=True))
    text = f"{what} differ by {distance:.2g} of the logits' deviation"
    found.add_if(distance <= limit, check, text, f"{text}, more than {limit:g}")


def _distance(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference of logits, of their standard deviation; a constant added to all does not count."""
    difference = (expected - expected.mean()) - (found - found.mean())
    largest = float(np.abs(difference).max() / max(float(expected.std()), 1e-12))
    return largest if np.isfinite(largest) else float("inf")
