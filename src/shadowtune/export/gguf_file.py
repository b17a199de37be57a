"""GGUF files, the single-file format of llama.cpp, for Llama, Mistral, Qwen2 and Qwen3.

``write_gguf`` writes a plain model with its tokenizer, prompt format and model card; ``read_metadata`` and
``tokenizer_of`` read them back.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from shadowtune.data.generation import end_tokens
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.data.segments import begin_tokens
from shadowtune.errors import CheckpointError, ShadowtuneError, UnsupportedArchitectureError
from shadowtune.model.files import reading

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Names of the architectures in llama.cpp, by transformers' ``model_type``."""

QUANTIZATIONS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
"""File types of the format, by their names on the command line."""

PROMPT_FORMAT, SPECIAL_TOKENS = "shadowtune.prompt_format", "shadowtune.special_tokens"
"""Our metadata, as JSON: the prompt format; the tokenizer's special tokens by their roles."""
CARD = "shadowtune.card"
"""Our metadata: the model card in Markdown."""
TOKENIZER = "tokenizer.huggingface.json"
"""The format's name for the content of tokenizer.json."""

_LLAMA3_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
_QWEN2_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
_BLOCK_SIZE = 32


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    quantization: str,
    prompt_format: PromptFormat | None = None,
    base: str = "",
    card: str = "",
) -> None:
    """Write a causal language model and its tokenizer.

    Matrices whose rows are not a multiple of 32 long cannot be quantized and stay float16; vectors stay float32.

    Args:
        model: in float32.
        tokenizer: byte-level BPE, with the chat template to save.
        file: to create.
        quantization: one of ``QUANTIZATIONS``.
        prompt_format: that belongs to the chat template, for the metadata; None leaves it out.
        base: name of the base beside which the model was trained, for the metadata; may be empty.
        card: model card in Markdown, for the metadata; may be empty.

    Raises:
        ShadowtuneError: if llama.cpp has no such architecture, attention or tokenizer.
    """
    import gguf

    config = model.config
    if config.model_type not in ARCHITECTURES or (config.model_type == "mistral" and config.sliding_window):
        raise UnsupportedArchitectureError(
            f"GGUF export supports {', '.join(ARCHITECTURES)} with full attention, not {config.model_type!r}; "
            "use --to safetensors"
        )
    writer = gguf.GGUFWriter(file, ARCHITECTURES[config.model_type])
    _add_settings(writer, model, file.stem, gguf.LlamaFileType[QUANTIZATIONS[quantization]])
    writer.add_tags(["shadowtune", "ShadowPEFT", "detached"])
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    if card:
        writer.add_string(CARD, card)
    form = prompt_format or PromptFormat()
    ends = end_tokens(model, tokenizer, form.ends)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    _add_ends(writer, ends)
    _add_penalty(writer, model)
    if prompt_format is not None:
        writer.add_string(PROMPT_FORMAT, json.dumps(asdict(replace(form, ends=tuple(ends)))))
    for name, tensor in _tensors(model).items():
        kind = _kind(tensor, quantization)
        data = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return llama.cpp's name of the pre-tokenizer of a byte-level BPE tokenizer.

    Raises:
        ShadowtuneError: if it is another kind of tokenizer, or its pre-tokenizer is not known here.
    """
    content = _backend(tokenizer)
    stage = content["pre_tokenizer"] or {}
    stages = stage.get("pretokenizers", [stage])
    kinds = [step.get("type") for step in stages]
    if content["model"]["type"] == "BPE" and _keeps_text(content["normalizer"]):
        if kinds == ["ByteLevel"] and stages[0]["use_regex"] and not stages[0]["add_prefix_space"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and stages[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"]:
            pattern = stages[0]["pattern"].get("Regex", "")
            for name, split in (("llama-bpe", _LLAMA3_SPLIT), ("qwen2", _QWEN2_SPLIT)):
                if split in pattern:
                    return name
    raise ShadowtuneError(
        "GGUF export supports byte-level BPE tokenizers that split as GPT-2, SmolLM2, Llama 3 or Qwen2 do; this one is "
        f"{content['model']['type']} with {kinds}"
    )


def _keeps_text(normalizer: Any) -> bool:
    """Return whether a normalizer does nothing, or only composes accents (Qwen2's; llama.cpp does not normalize)."""
    return not normalizer or normalizer["type"] == "NFC"


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return content


def _add_settings(writer: Any, model: PreTrainedModel, name: str, file_type: int) -> None:
    config = model.config
    head_width = head_width_of(config)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def head_width_of(config: Any) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def written_ends(ends: Sequence[int]) -> Sequence[int]:
    """Return the end tokens that the format can name, at most two; llama.cpp knows common others by their texts."""
    return ends[:2]


def _add_ends(writer: Any, ends: Sequence[int]) -> None:
    """Write the tokens that end an answer: the first as end of text and of a turn, the second as end of a message."""
    named = written_ends(ends)
    if named:
        writer.add_eos_token_id(named[0])
        writer.add_eot_token_id(named[0])
    if len(named) > 1:
        writer.add_eom_token_id(named[1])


def _add_penalty(writer: Any, model: PreTrainedModel) -> None:
    """Write the model's repetition penalty as llama.cpp's default for requests."""
    import gguf

    penalty = None if model.generation_config is None else model.generation_config.repetition_penalty
    if penalty is not None and penalty != 1.0:
        writer.add_float32(gguf.Keys.General.SAMPLING_PENALTY_REPEAT, penalty)
        writer.add_int32(gguf.Keys.General.SAMPLING_PENALTY_LAST_N, -1)  # over all tokens, as transformers does


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    import gguf

    content = _backend(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [gguf.TokenType.UNUSED] * vocabulary
    for token, index in tokenizer.get_vocab().items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = content["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    ids = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id, "unk": tokenizer.unk_token_id}
    adders = {
        "bos": writer.add_bos_token_id,
        "pad": writer.add_pad_token_id,
        "unk": writer.add_unk_token_id,
    }
    for name, index in ids.items():
        if index is not None:
            adders[name](index)
    writer.add_add_bos_token(bool(begin_tokens(tokenizer)))
    writer.add_add_eos_token(False)  # a prompt continues, even if the tokenizer appends an end to texts
    writer.add_string(TOKENIZER, tokenizer.backend_tokenizer.to_str())
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if role.endswith("_token")}
    writer.add_string(SPECIAL_TOKENS, json.dumps(special))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return all tensors under llama.cpp's names, in float32."""
    import gguf

    config, found = model.config, dict[str, np.ndarray]()
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data, module = tensor.float().cpu().numpy(), name.split(".")[-2]
        if kind == gguf.MODEL_ARCH.LLAMA and module in heads:
            data = _interleave(data, heads[module])
        their_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if their_name is None:
            raise ShadowtuneError(f"llama.cpp has no tensor {name} in its {ARCHITECTURES[config.model_type]}")
        found[their_name] = data
    factors = _frequency_factors(model)
    if factors is not None:
        found["rope_freqs.weight"] = factors
    return found


def _interleave(data: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the two halves of each head, as llama.cpp's rotary embedding of llama expects."""
    halves = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
    return halves.swapaxes(1, 2).reshape(data.shape)


def _frequency_factors(model: PreTrainedModel) -> np.ndarray | None:
    """Return the divisors of the rotary frequencies; None if they are all 1."""
    config = model.config
    frequencies = model.get_submodule("model.rotary_emb").get_buffer("inv_freq").float()
    width = head_width_of(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    if len(frequencies) != len(plain):
        raise ShadowtuneError("GGUF export does not support partially rotated heads; use --to safetensors")
    if torch.allclose(frequencies, plain, rtol=1e-5):
        return None
    kind = config.rope_parameters.get("rope_type")
    if ARCHITECTURES[config.model_type] != "llama" or kind not in ("llama3", "linear"):
        raise ShadowtuneError(f"GGUF export does not support rope type {kind!r} of {config.model_type}")
    return (plain / frequencies).numpy()


def _kind(tensor: np.ndarray, quantization: str) -> str:
    """Return the storage type of a tensor."""
    if tensor.ndim == 1 or quantization == "f32":
        return "F32"
    return "F16" if quantization == "f16" or tensor.shape[-1] % _BLOCK_SIZE else quantization.upper()


def read_metadata(file: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file by key; raises CheckpointError if it is damaged or gguf is not installed."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{file}: GGUF files need pip install 'shadowtune[export]'") from None
    try:
        return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{file} is no GGUF file, or damaged: {str(error).splitlines()[0]}") from None


def tokenizer_of(file: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the metadata of a file of ours; of other files, what transformers' reader makes of it."""
    with reading(f"{file} has a damaged tokenizer"):
        if TOKENIZER not in metadata:
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        special = json.loads(metadata.get(SPECIAL_TOKENS, "{}"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=FastTokenizer.from_str(metadata[TOKENIZER]), **special)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def generation_config_of(metadata: dict[str, Any]) -> GenerationConfig:
    """Return the end tokens and the repetition penalty in the metadata of a file."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(int(token) for token in named if token is not None))
    penalty = metadata.get("general.sampling.penalty_repeat")
    return GenerationConfig(eos_token_id=ends or None, repetition_penalty=None if penalty is None else float(penalty))
