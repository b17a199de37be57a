"""A detached model opened for answering, whatever kind of file it is: what runs it, its tokenizer, its prompts."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer

from shadowtune.data.chat_template import restore_chat_template
from shadowtune.data.generation import end_tokens, ends_of_config
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError
from shadowtune.export import onnx_file
from shadowtune.export.exporting import FORMATS, read_tokenizer
from shadowtune.export.gguf_file import PROMPT_FORMAT, SPECIAL_TOKENS, TOKENIZER
from shadowtune.export.runtimes import Runtime, TorchModel
from shadowtune.model.malformed import reading

POSITIONS = 2048
"""Of a model that does not say how many it has."""


@dataclass
class OpenModel:
    """A model that answers, and what it needs to."""

    runtime: Runtime
    tokenizer: Tokenizer
    prompt_format: PromptFormat
    ends: frozenset[int]
    """Tokens that end an answer."""
    max_length: int
    """Tokens of prompt and answer together."""
    vocabulary: int
    """Tokens that the model chooses from."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Its penalties hold where a request does not say otherwise."""


def open_model(path: Path, max_length: int | None = None) -> OpenModel:
    """Open a GGUF file, or a directory with ONNX or safetensors.

    Args:
        path: as ``shadowtune detach`` or ``export`` wrote it; plain models of others work as well.
        max_length: tokens of prompt and answer together; by default as many as the model has positions.

    Raises:
        CheckpointError: if it is none of these, or damaged.
        DataError: if its prompt format is damaged.
    """
    if path.is_file():
        return _open_gguf(path, max_length)
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
    settings = vars(config)
    positions = settings.get("max_position_embeddings", settings.get("n_positions")) or POSITIONS
    form = PromptFormat.load(path)
    ends = frozenset(ends_of_config(generation, tokenizer, form.ends))
    length = min(positions, max_length or positions)
    return OpenModel(runtime, tokenizer, form, ends, length, config.vocab_size, generation)


def of_model(model: Any, tokenizer: Tokenizer, prompt_format: PromptFormat) -> OpenModel:
    """Take a model that is loaded already: a plain one, or an attached one in the mode that it is in."""
    settings = vars(model.config.get_text_config(decoder=True))
    positions = settings.get("max_position_embeddings", settings.get("n_positions")) or POSITIONS
    ends = frozenset(end_tokens(model, tokenizer, prompt_format.ends))
    size, generation = model.config.vocab_size, model.generation_config
    return OpenModel(TorchModel(model), tokenizer, prompt_format, ends, positions, size, generation)


def _open_gguf(file: Path, max_length: int | None) -> OpenModel:
    metadata = _metadata(file)
    try:
        positions = int(metadata[f"{metadata['general.architecture']}.context_length"])
        vocabulary = len(metadata["tokenizer.ggml.tokens"])
    except KeyError as error:
        raise CheckpointError(f"{file} is no GGUF file of a language model: it lacks {error.args[0]}") from None
    length = min(positions, max_length or positions)
    tokenizer = _gguf_tokenizer(file, metadata)
    said = metadata.get(PROMPT_FORMAT)
    prompt_format = PromptFormat() if said is None else PromptFormat.parse(said, str(file))
    restore_chat_template(tokenizer, prompt_format)
    generation = _gguf_generation(metadata)
    ends = frozenset(ends_of_config(generation, tokenizer, prompt_format.ends))
    runtime = FORMATS["gguf"].open(file, length)
    return OpenModel(runtime, tokenizer, prompt_format, ends, length, vocabulary, generation)


def _gguf_generation(metadata: dict[str, Any]) -> GenerationConfig:
    """What a GGUF file says of ends and penalties."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(int(token) for token in named if token is not None))
    penalty = metadata.get("general.sampling.penalty_repeat")
    return GenerationConfig(eos_token_id=ends or None, repetition_penalty=None if penalty is None else float(penalty))


def _metadata(file: Path) -> dict[str, Any]:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{file}: GGUF files need pip install 'shadowtune[export]'") from None
    try:
        return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{file} is no GGUF file, or damaged: {str(error).splitlines()[0]}") from None


def _gguf_tokenizer(file: Path, metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that we put into the metadata; of others' files, what transformers makes of them."""
    if TOKENIZER not in metadata:
        return read_tokenizer(str(file.parent), gguf_file=file.name)
    with reading(f"{file} has a damaged tokenizer"):
        special = json.loads(metadata.get(SPECIAL_TOKENS, "{}"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=FastTokenizer.from_str(metadata[TOKENIZER]), **special)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer
