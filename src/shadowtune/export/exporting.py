"""From a plain transformers directory to GGUF, ONNX or smaller safetensors, checked before it gets its name."""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from shadowtune.data.chat_template import add_chat_template, load_tokenizer_and_format, save_tokenizer
from shadowtune.data.encoding import prompt_ids
from shadowtune.data.generation import end_tokens
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError, ShadowtuneError
from shadowtune.export import gguf_file, onnx_file
from shadowtune.export.card import Card, Form, describe_prompt, write_card
from shadowtune.export.genai_config import write_genai_config
from shadowtune.export.places import check_free, staged
from shadowtune.export.runtimes import GgufModel, OnnxModel, Runtime, TorchModel
from shadowtune.export.verification import TIE, Agreement, compare, require_equal
from shadowtune.model.detached import write_plain
from shadowtune.model.malformed import reading
from shadowtune.model.older_versions import write_older_keys
from shadowtune.model.quantization import quantization_arguments

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Storage types that only round; all others quantize."""


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    quantizations: tuple[str, ...]
    """What --quant may be; the first is taken if it is not given."""
    packages: tuple[str, ...]
    """Python packages that writing needs."""
    single_file: bool
    write: Callable[..., None]
    """Write (model, tokenizer, file or directory, quantization, format of the prompts). A single file also takes the
    name of the ``base`` and the model ``card``."""
    open: Callable[[Path, int], Runtime]
    """Open what was written, for sequences of so many tokens."""


def _write_onnx(
    model: PreTrainedModel, tokenizer: Tokenizer, directory: Path, quantization: str, prompt_format: PromptFormat
) -> None:
    onnx_file.write_onnx(model, directory / onnx_file.FILE, quantization)
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    ends = end_tokens(model, tokenizer, prompt_format.ends)
    write_genai_config(model, tokenizer, ends, onnx_file.FILE, directory)
    save_tokenizer(tokenizer, prompt_format, directory)
    write_older_keys(directory)


def _write_safetensors(
    model: PreTrainedModel, tokenizer: Tokenizer, directory: Path, quantization: str, prompt_format: PromptFormat
) -> None:
    save_tokenizer(tokenizer, prompt_format, directory)
    if quantization in DTYPES:
        copied: Any = copy.deepcopy(model)
        write_plain(copied.to(DTYPES[quantization]), directory)
        write_older_keys(directory)
        return
    settings = quantization_arguments("int8", torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(
        str(model.config.name_or_path), dtype=torch.float32, trust_remote_code=False, **settings
    )
    quantized.save_pretrained(directory)
    write_older_keys(directory)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)


def _open_gguf(file: Path, length: int) -> Runtime:
    """Open in llama.cpp or, where its package is missing, through transformers' own reader."""
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
    """What an export came to."""

    path: Path
    bytes: int
    """On disk, tokenizer and config included where they are files of their own."""
    runtime: str
    """What ran the file in the check."""
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
    """Return where an export of ``directory`` goes if nothing else is said: beside it."""
    directory = directory.absolute()
    suffix = f"-{quantization}.gguf" if FORMATS[to].single_file else f"-{to}-{quantization}"
    return directory.with_name(directory.name + suffix)


def read_tokenizer(directory: str, **kwargs: str) -> Tokenizer:
    """Read a tokenizer, with the chat template that it had before training; raises CheckpointError if there is none."""
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
        kinds = config.architectures or []
        if any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise CheckpointError(f"{directory} is a classifier; only causal language models are exported")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()
        return model, load_tokenizer_and_format(str(directory))[0]


def export(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    to: str,
    quantization: str,
    out: Path,
    prompts: Sequence[list[int]],
    max_new_tokens: int = 32,
    prompt_format: PromptFormat | None = None,
    card: Card | None = None,
) -> Exported:
    """Write a model, run what was written, and keep it only if it says the same.

    Args:
        model: as ``read_plain`` gives it.
        to: one of ``FORMATS``.
        quantization: one of the format's.
        out: the new file or directory.
        prompts: token ids. In "f32", "f16" and "bf16" their greedy continuations must equal those of the model with its
            matrices rounded likewise; otherwise the agreement with the model itself is measured.
        max_new_tokens: of each continuation.
        prompt_format: what stands around a user's words; by default the tokenizer's chat template alone.
        card: what is known about the model, for the README.md of a directory.

    Raises:
        ShadowtuneError: if ``out`` is taken, the format cannot express the model, or tokens differ.
    """
    kind, form = FORMATS[to], prompt_format or PromptFormat()
    check_free(out)
    exact = quantization in DTYPES
    reference = TorchModel(_rounded(model, DTYPES[quantization]) if exact else model)
    length = max(map(len, prompts)) + max_new_tokens
    ends = end_tokens(model, tokenizer, form.ends)
    with staged(out.parent if kind.single_file else out) as staging:
        written = staging / out.name if kind.single_file else staging
        saved = add_chat_template(tokenizer, form)[1]
        card = card or Card("")
        card = card if card.prompt else replace(card, prompt=describe_prompt(saved, tokenizer))
        chat = saved.has_saved_template(tokenizer)
        told = {"base": card.base, "card": card.text(model.num_parameters(), out.name, _FORMS[to], chat)}
        kind.write(model, tokenizer, written, quantization, form, **(told if kind.single_file else {}))
        runtime = kind.open(written, length)
        if isinstance(runtime, GgufModel):
            _check_tokens(runtime, tokenizer, prompts)
            _check_ends(runtime, gguf_file.written_ends(ends), prompts[0])
        agreement = compare(runtime, reference, prompts, max_new_tokens, ends, TIE if exact else 0.0)
        if exact:
            require_equal(agreement, f"{to} {quantization}")
        if not kind.single_file:
            write_card(staging, card, _FORMS[to], out.name, chat, model.num_parameters())
        files = [written] if kind.single_file else list(staging.iterdir())
        size = sum(file.stat().st_size for file in files)
    return Exported(out, size, type(runtime).__name__, agreement)


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """A copy in float32 whose matrices were rounded to ``dtype``."""
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
    """Raise ShadowtuneError if llama.cpp goes on after a token that ends an answer."""
    for token in ends:
        if not runtime.stops_at(token, prompt):
            raise ShadowtuneError(f"llama.cpp does not stop at token {token}, which ends an answer; nothing is kept")
