"""Export of a plain transformers directory to GGUF, ONNX or smaller safetensors.

Files are written to a temporary directory, run, and compared with the model; they get their name only if they compute
the same: equal greedy tokens for formats that only round, a measured agreement for those that quantize.
"""

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from shadowtune.data.chat_template import add_chat_template, load_tokenizer_and_format
from shadowtune.data.encoding import prompt_ids
from shadowtune.data.generation import end_tokens
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError, ShadowtuneError
from shadowtune.export import gguf_file, onnx_file
from shadowtune.export.card import FILE as CARD_FILE
from shadowtune.export.card import Card, Form, describe_prompt
from shadowtune.export.runtimes import GgufModel, OnnxModel, Runtime, TorchModel
from shadowtune.model.checkpoint import write_older_keys
from shadowtune.model.detached import write_plain
from shadowtune.model.files import reading, writing_into
from shadowtune.model.quantization import quantization_arguments

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Storage types that only round; all others quantize."""
TIE = 0.02
"""For formats that only round: difference of two logits, relative to the standard deviation of all, at which either
token may be chosen. Sums in another order, or llama.cpp's cache in 16 bits, decide between tokens this close."""


def check_free(target: Path) -> None:
    """Raise ShadowtuneError if a file or a non-empty directory has this name, or a directory above it is a file."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ShadowtuneError(f"{target} exists already; name another --out, or remove it")
    if (above := next(parent for parent in target.absolute().parents if parent.exists())).is_file():
        raise ShadowtuneError(f"{target} cannot be made: {above} is a file")


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory whose files are moved into ``directory`` at the end; on an error nothing is left."""
    made = not directory.exists()
    try:
        with writing_into(directory) as staging:
            yield staging
    finally:
        if made and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


@dataclass(frozen=True)
class Agreement:
    """Comparison of the greedy tokens of two models."""

    prompts: int
    tokens: int
    """Tokens that the reference chose, ends included."""
    equal: int
    """Of these, how many the other model chose at the same index, each model continuing its own tokens."""
    ties: int
    """Prompts at which the models differ in a token that the reference finds as likely; compared up to there."""
    found: list[list[int]] = field(repr=False)
    expected: list[list[int]] = field(repr=False)

    @property
    def share(self) -> float:
        """Equal tokens over all tokens."""
        return self.equal / max(self.tokens, 1)


def compare(
    other: Runtime,
    reference: TorchModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    ends: Collection[int],
    tie: float = 0.0,
) -> Agreement:
    """Continue prompts greedily by two models and count equal tokens; the end of an answer counts as a token.

    Args:
        other: the model to check.
        reference: the model that it must equal.
        prompts: token ids.
        max_new_tokens: of each continuation.
        ends: tokens that end an answer.
        tie: a prompt is compared up to a token where the reference's logits of both choices differ by no more than
            this share of the standard deviation of all logits; 0 compares all tokens.
    """
    tokens = equal = ties = 0
    found, expected = [], []
    for prompt in prompts:
        found.append(other.generate(prompt, max_new_tokens, ends))
        expected.append(reference.generate(prompt, max_new_tokens, ends))
        ours, theirs = (_with_end(ids, max_new_tokens) for ids in (found[-1], expected[-1]))
        pairs = list(zip(ours, theirs, strict=False))
        first = next((index for index, (one, two) in enumerate(pairs) if one != two), None)
        if tie and first is not None:
            logits = reference.logits(prompt + expected[-1][:first])
            if _is_tie(logits, pairs[first][0], ends, tie):
                ties += 1
                theirs, pairs = theirs[:first], pairs[:first]
        tokens += len(theirs)
        equal += sum(one == two for one, two in pairs)
    return Agreement(len(prompts), tokens, equal, ties, found, expected)


def _with_end(ids: list[int], limit: int) -> list[int | None]:
    return [*ids, None] if len(ids) < limit else [*ids]


def _is_tie(logits: np.ndarray, chosen: int | None, ends: Collection[int], tie: float) -> bool:
    """Return whether the chosen token, None for an end, is as likely as the likeliest."""
    candidate = logits[list(ends)].max() if chosen is None else logits[chosen]
    return bool(logits.max() - candidate <= tie * logits.std())


@dataclass(frozen=True)
class Format:
    """A file format: how it is written and run."""

    quantizations: tuple[str, ...]
    """Values of --quant; the first is the default."""
    packages: tuple[str, ...]
    """Python packages that writing needs."""
    single_file: bool
    write: Callable[..., None]
    """Write (model, tokenizer with the chat template to save, file or directory, quantization, prompt format, name of
    the base, text of the model card); the last two may be left out."""
    open: Callable[[Path, int], Runtime]
    """Open what was written, for sequences of a maximum length."""


def _write_onnx(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    directory: Path,
    quantization: str,
    prompt_format: PromptFormat,
    base: str = "",
    card: str = "",
) -> None:
    onnx_file.write_onnx(model, directory / onnx_file.FILE, quantization)
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    ends = end_tokens(model, tokenizer, prompt_format.ends)
    onnx_file.write_genai_config(model, tokenizer, ends, directory)
    _finish_directory(tokenizer, directory, prompt_format, card)


def _write_safetensors(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    directory: Path,
    quantization: str,
    prompt_format: PromptFormat,
    base: str = "",
    card: str = "",
) -> None:
    if quantization in DTYPES:
        copied: Any = copy.deepcopy(model)
        write_plain(copied.to(DTYPES[quantization]), directory)
    else:
        settings = quantization_arguments("int8", torch.float32)
        quantized = AutoModelForCausalLM.from_pretrained(
            str(model.config.name_or_path), dtype=torch.float32, trust_remote_code=False, **settings
        )
        quantized.save_pretrained(directory)
        for file in directory.glob("*.safetensors"):
            file.chmod(0o644)
    _finish_directory(tokenizer, directory, prompt_format, card)


def _finish_directory(tokenizer: Tokenizer, directory: Path, prompt_format: PromptFormat, card: str) -> None:
    """Write tokenizer, prompt format and model card, and add the config keys of transformers 4."""
    tokenizer.save_pretrained(str(directory))
    prompt_format.save(directory)
    write_older_keys(directory)
    if card:
        (directory / CARD_FILE).write_text(card, encoding="utf-8")


def _open_gguf(file: Path, length: int) -> Runtime:
    """Open a file in llama.cpp or, without its package, by transformers' own reader."""
    if importlib.util.find_spec("xllamacpp") is not None:
        return GgufModel(file, max(length, 256), threads=torch.get_num_threads())
    unpacked = GgufConfig(dequantize=True)
    return TorchModel(file.parent, gguf_file=file.name, quantization_config=unpacked, dtype=torch.float32)


FORMATS = {
    "gguf": Format(tuple(gguf_file.QUANTIZATIONS), ("gguf",), True, gguf_file.write_gguf, _open_gguf),
    "onnx": Format(
        onnx_file.QUANTIZATIONS,
        ("onnx", "onnxruntime"),
        False,
        _write_onnx,
        lambda path, length: OnnxModel(path, torch.get_num_threads()),
    ),
    "safetensors": Format(
        ("f16", "bf16", "f32", "int8"),
        (),
        False,
        _write_safetensors,
        lambda path, length: TorchModel(path, dtype=torch.float32),
    ),
}
"""The formats by their names on the command line."""

_FORMS: dict[str, Form] = {"gguf": "gguf", "onnx": "onnx", "safetensors": "detached"}


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    path: Path
    bytes: int
    """On disk, with tokenizer and config."""
    runtime: str
    """Class that ran the file in the check."""
    agreement: Agreement


def check_export(to: str, quantization: str | None) -> str:
    """Return the quantization to use.

    Raises:
        ShadowtuneError: if the format has no such quantization, or a package is missing.
    """
    chosen = FORMATS[to]
    quantization = quantization or chosen.quantizations[0]
    if quantization not in chosen.quantizations:
        raise ShadowtuneError(f"--to {to} has no --quant {quantization}; it has {', '.join(chosen.quantizations)}")
    missing = [name for name in chosen.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ShadowtuneError(f"--to {to} needs {', '.join(missing)}: pip install 'shadowtune[export]'")
    return quantization


def default_path(directory: Path, to: str, quantization: str) -> Path:
    """Return the default path of an export of ``directory``: beside it."""
    directory = directory.absolute()
    suffix = f"-{quantization}.gguf" if FORMATS[to].single_file else f"-{to}-{quantization}"
    return directory.with_name(directory.name + suffix)


def read_tokenizer(directory: str, **kwargs: str) -> Tokenizer:
    """Read a tokenizer with the chat template that it had before training; raises CheckpointError if there is none."""
    with reading(f"{directory} has no tokenizer"):
        tokenizer, _ = load_tokenizer_and_format(directory, **kwargs)
    return tokenizer


def read_plain(directory: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Read a detached directory, in float32.

    Raises:
        CheckpointError: if it holds no plain causal language model with a tokenizer.
    """
    with reading(f"cannot read {directory}"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if any(kind.endswith("ForSequenceClassification") for kind in config.architectures or []):
            raise CheckpointError(f"{directory} is a classifier; only causal language models are exported")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()
        return model, load_tokenizer_and_format(str(directory))[0]


def export(
    plain: tuple[PreTrainedModel, Tokenizer],
    to: str,
    quantization: str,
    out: Path,
    prompts: Sequence[list[int]],
    max_new_tokens: int = 32,
    prompt_format: PromptFormat | None = None,
    card: Card | None = None,
) -> Exported:
    """Write a model, run what was written, and keep it only if it computes the same.

    Args:
        plain: model and tokenizer as ``read_plain`` returns them.
        to: one of ``FORMATS``.
        quantization: one of the format's.
        out: the new file or directory.
        prompts: token ids. In "f32", "f16" and "bf16" their greedy continuations must equal those of the model with its
            matrices rounded likewise; otherwise the agreement with the model itself is measured.
        max_new_tokens: of each continuation.
        prompt_format: of the model's prompts; by default the tokenizer's chat template alone.
        card: facts for the model card.

    Raises:
        ShadowtuneError: if ``out`` exists, the format cannot express the model, or tokens differ.
    """
    (model, tokenizer), kind, form = plain, FORMATS[to], prompt_format or PromptFormat()
    check_free(out)
    exact = quantization in DTYPES
    reference = TorchModel(_rounded(model, DTYPES[quantization]) if exact else model)
    ends = end_tokens(model, tokenizer, form.ends)
    baked, saved = add_chat_template(tokenizer, form)
    card = card or Card("")
    card = card if card.prompt else replace(card, prompt=describe_prompt(saved, tokenizer))
    chat = saved.has_saved_template(tokenizer)
    text = card.text(model.num_parameters(), out.name, _FORMS[to], chat)
    with staged(out.parent if kind.single_file else out) as staging:
        written = staging / out.name if kind.single_file else staging
        kind.write(model, baked, written, quantization, saved, card.base, text)
        runtime = kind.open(written, max(map(len, prompts)) + max_new_tokens)
        if isinstance(runtime, GgufModel):
            _check_tokens(runtime, tokenizer, prompts)
            _check_ends(runtime, gguf_file.written_ends(ends), prompts[0])
        agreement = compare(runtime, reference, prompts, max_new_tokens, ends, TIE if exact else 0.0)
        if exact and agreement.equal != agreement.tokens:
            raise ShadowtuneError(
                f"{to} {quantization} chooses other tokens than the detached model: {agreement.equal} of "
                f"{agreement.tokens} are equal on {agreement.prompts} prompts; nothing is kept"
            )
        files = [written] if kind.single_file else list(staging.iterdir())
        size = sum(file.stat().st_size for file in files)
    return Exported(out, size, type(runtime).__name__, agreement)


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """Return a copy in float32 whose matrices are rounded to ``dtype``."""
    if dtype == torch.float32:
        return model
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.to(dtype))
    return copied


def _check_tokens(runtime: GgufModel, tokenizer: Tokenizer, prompts: Sequence[list[int]]) -> None:
    """Raise ShadowtuneError if llama.cpp splits the prompts' texts in another way than the tokenizer."""
    for prompt in prompts:
        text = str(tokenizer.decode(prompt))
        if runtime.tokenize(text) != prompt_ids(text, tokenizer, chat_template=False):
            raise ShadowtuneError(f"llama.cpp gives {text[:60]!r} other tokens than the tokenizer; nothing is kept")


def _check_ends(runtime: GgufModel, ends: Sequence[int], prompt: list[int]) -> None:
    """Raise ShadowtuneError if llama.cpp continues after a token that ends an answer."""
    for token in ends:
        if not runtime.stops_at(token, prompt):
            raise ShadowtuneError(f"llama.cpp does not stop at token {token}, which ends an answer; nothing is kept")
