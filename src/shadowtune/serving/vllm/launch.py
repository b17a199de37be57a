"""Start vLLM's server on a saved shadow: its version, the directory that it serves, its command line."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from shadowtune.data.chat_template import save_tokenizer
from shadowtune.data.generation import ends_of_config
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.serving.vllm.support import DISTRIBUTIONS, TESTED_VLLM

MODULE = "vllm.entrypoints.openai.api_server"
PROBE = """
import json
from importlib import metadata

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

plugins = [point.name for point in metadata.entry_points(group="vllm.general_plugins")]
print(json.dumps({"vllm": [version(name) for name in %r], "plugin": "shadowtune" in plugins}))
"""
INSTALL = "docs/vllm.md says how to install both into one environment; VLLM_PYTHON names its interpreter"


@dataclass(frozen=True)
class VllmServer:
    """Settings of vLLM's server."""

    python: str
    """The interpreter of an environment with vLLM and this package."""
    host: str
    port: int
    name: str
    """Model name in requests."""
    dtype: str
    """Precision of base and backbone: "float32", "bfloat16", "float16", or "auto"."""
    max_sequences: int
    origins: tuple[str, ...] = ()
    """Origins whose pages may call the server."""
    arguments: tuple[str, ...] = ()
    """Further arguments of vLLM, which override the others."""

    def command(self, directory: Path, config: ShadowModelConfig) -> list[str]:
        """Return the command line that serves a directory of ``write_model_directory``."""
        words: list[Any] = [self.python, "-m", MODULE, "--model", directory, "--served-model-name", self.name]
        words += ["--host", self.host, "--port", self.port, "--dtype", self.dtype]
        words += ["--max-num-seqs", self.max_sequences]
        assert config.base_config is not None
        own, both = (
            vars(each).get("max_position_embeddings")
            for each in (config.base_config.get_text_config(decoder=True), config)
        )
        if own is not None and both is not None and both < own:
            words += ["--max-model-len", both]
        if self.origins:
            words += ["--allowed-origins", json.dumps(self.origins)]
        return [*map(str, words), *self.arguments]


def check_vllm(python: str) -> str:
    """Return the version of vLLM in the environment of an interpreter.

    Raises:
        ShadowtuneError: if the interpreter does not run, or the environment lacks vLLM in a tested version, or the
            plugin.
    """
    try:
        probe = PROBE % (DISTRIBUTIONS,)
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ShadowtuneError(f"cannot run {python} to start vLLM: {error}; {INSTALL}") from None
    version = next((version for version in found["vllm"] if version is not None), None)
    if version is None:
        raise ShadowtuneError(f"the environment of {python} has no vLLM; {INSTALL}")
    if not TESTED_VLLM.contains(Version(version).base_version):
        raise ShadowtuneError(
            f"the environment of {python} has vLLM {version}, and the plugin was tested with {TESTED_VLLM}; "
            f"install such a version, or start python -m {MODULE} yourself"
        )
    if not found["plugin"]:
        raise ShadowtuneError(
            f"vLLM of {python} does not find the plugin: shadowtune is not installed there; {INSTALL}"
        )
    return str(version)


def check_single(names: Sequence[str]) -> str:
    """Return the only name; raises ConfigError for several, since the plugin runs one adapter in each server."""
    if len(names) > 1:
        raise ConfigError(
            f"vLLM serves one adapter in each server, got {', '.join(names)}; start a server for each, or use "
            "--engine shadowtune, which serves all of them on one base"
        )
    return names[0]


def write_model_directory(
    source: Path,
    directory: Path,
    config: ShadowModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptFormat,
) -> None:
    """Write a directory that vLLM serves as it is: links to a shadow's tensors, and the files that vLLM reads.

    Args:
        source: the saved shadow.
        directory: an existing, empty one.
        config: the shadow's, with the base where vLLM finds it.
        tokenizer: of the shadow, with its original chat template; saved with the one that makes the prompts of
            training.
        form: the prompt format of training, whose end tokens are written to ``generation_config.json``.
    """
    for file in source.absolute().glob("model*.safetensors*"):
        (directory / file.name).symlink_to(file)
    config.to_json_file(directory / CONFIG_NAME, use_diff=False)
    own = (source / GENERATION_CONFIG_NAME).is_file()
    generation = GenerationConfig.from_pretrained(source) if own else GenerationConfig()
    generation.eos_token_id = ends_of_config(generation, tokenizer, form.ends) or None
    generation.to_json_file(directory / GENERATION_CONFIG_NAME)
    save_tokenizer(tokenizer, form, directory)
