"""Loading of detached models for generation, in any format: runtime, tokenizer, prompt format, end tokens."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from shadowtune.core.deferral_head import DeferralHead
from shadowtune.data.chat_template import restore_chat_template
from shadowtune.data.generation import end_tokens, ends_of_config
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError
from shadowtune.export import gguf_file, onnx_file
from shadowtune.export.exporting import FORMATS, read_tokenizer
from shadowtune.export.runtimes import GgufModel, Runtime, Stepwise, TorchModel
from shadowtune.model.deferral_files import read_deferral_head
from shadowtune.model.files import reading

POSITIONS = 2048
"""Number of positions of a model whose config names none."""


@dataclass
class LoadedModel:
    """A detached model with everything that generation needs."""

    runtime: Runtime
    tokenizer: Tokenizer
    prompt_format: PromptFormat
    ends: frozenset[int]
    """Tokens that end an answer."""
    max_length: int
    """Maximum number of tokens of prompt and answer together."""
    vocabulary: int
    """Size of the vocabulary."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Its penalties are the defaults of requests."""

    @property
    def deferral_head(self) -> DeferralHead | None:
        """The deferral head of the runtime; None without one."""
        return self.runtime.deferral_head if isinstance(self.runtime, Stepwise | GgufModel) else None

    def set_deferral_head(self, head: DeferralHead | None) -> None:
        """Evaluate a head at each token, or none."""
        assert isinstance(self.runtime, Stepwise | GgufModel)
        self.runtime.deferral_head = head


def load_model(path: Path, max_length: int | None = None) -> LoadedModel:
    """Load a GGUF file, or a directory with ONNX or safetensors.

    Args:
        path: written by ``shadowtune detach`` or ``export``; plain models of other sources work too.
        max_length: tokens of prompt and answer together; by default the number of the model's positions.

    Raises:
        CheckpointError: if it is none of these, or damaged.
        DataError: if its prompt format is damaged.
    """
    loaded = _load_gguf(path, max_length) if path.is_file() else _load_directory(path, max_length)
    saved = read_deferral_head(path)
    if saved is not None:
        loaded.set_deferral_head(saved.head)
    return loaded


def _load_directory(path: Path, max_length: int | None) -> LoadedModel:
    if not (path / "config.json").is_file():
        hint = "; it is a run: shadowtune detach it first" if (path / "config.yaml").is_file() else ""
        raise CheckpointError(f"{path} holds no detached model (a directory with config.json, or a GGUF file){hint}")
    with reading(f"cannot read {path}"):
        if json.loads((path / "config.json").read_text()).get("model_type") == "shadow":
            raise CheckpointError(f"{path} is a saved shadow, not yet detached: shadowtune detach {path} --out DIR")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config(decoder=True)
        kind = "onnx" if (path / onnx_file.FILE).is_file() else "safetensors"
        runtime = FORMATS[kind].open(path, max_length or POSITIONS)
        tokenizer = read_tokenizer(str(path))
        file = path / "generation_config.json"
        generation = GenerationConfig.from_pretrained(path) if file.is_file() else GenerationConfig()
    form, positions = PromptFormat.load(path), _positions(config)
    ends = frozenset(ends_of_config(generation, tokenizer, form.ends))
    length = min(positions, max_length or positions)
    return LoadedModel(runtime, tokenizer, form, ends, length, config.vocab_size, generation)


def wrap_model(
    model: Any, tokenizer: Tokenizer, prompt_format: PromptFormat, deferral_head: DeferralHead | None = None
) -> LoadedModel:
    """Return a model that is in memory already, plain or attached in its current mode, as a ``LoadedModel``."""
    positions = _positions(model.config.get_text_config(decoder=True))
    ends = frozenset(end_tokens(model, tokenizer, prompt_format.ends))
    size, generation = model.config.vocab_size, model.generation_config
    runtime = TorchModel(model)
    runtime.deferral_head = deferral_head
    return LoadedModel(runtime, tokenizer, prompt_format, ends, positions, size, generation)


def _positions(config: PreTrainedConfig) -> int:
    return getattr(config, "max_position_embeddings", None) or POSITIONS


def _load_gguf(file: Path, max_length: int | None) -> LoadedModel:
    metadata = gguf_file.read_metadata(file)
    try:
        positions = int(metadata[f"{metadata['general.architecture']}.context_length"])
        vocabulary = len(metadata["tokenizer.ggml.tokens"])
    except KeyError as error:
        raise CheckpointError(f"{file} is no GGUF file of a language model: it lacks {error.args[0]}") from None
    length = min(positions, max_length or positions)
    tokenizer = gguf_file.tokenizer_of(file, metadata)
    saved = metadata.get(gguf_file.PROMPT_FORMAT)
    prompt_format = PromptFormat() if saved is None else PromptFormat.parse(saved, str(file))
    restore_chat_template(tokenizer, prompt_format)
    generation = gguf_file.generation_config_of(metadata)
    ends = frozenset(ends_of_config(generation, tokenizer, prompt_format.ends))
    runtime = FORMATS["gguf"].open(file, length)
    return LoadedModel(runtime, tokenizer, prompt_format, ends, length, vocabulary, generation)
