"""``genai_config.json``, by which onnxruntime-genai opens a directory with ``model.onnx``.

The keys are those of https://onnxruntime.ai/docs/genai/reference/config.html.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.export.gguf_file import head_width_of

FILE = "genai_config.json"


def write_genai_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], model_file: str, directory: Path
) -> None:
    """Write the config beside an ONNX file of ``onnx_file.write_onnx``.

    Args:
        model: that was exported.
        tokenizer: its own.
        ends: tokens that end an answer.
        model_file: name of the ONNX file.
        directory: where it is.
    """
    config: Any = model.config
    names = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": model_file,
        "head_size": head_width_of(config),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": names["key"],
            "past_value_names": names["value"],
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": names["key"].replace("past_key_values", "present"),
            "present_value_names": names["value"].replace("past_key_values", "present"),
        },
    }
    pad = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    generation = model.generation_config
    penalty = None if generation is None else generation.repetition_penalty
    written: dict[str, Any] = {
        "model": {
            "type": config.model_type,
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "eos_token_id": list(ends),
            "pad_token_id": pad if pad is not None else next(iter(ends), 0),
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "repetition_penalty": 1.0 if penalty is None else penalty,
            "past_present_share_buffer": False,  # the graph concatenates its caches
        },
    }
    if tokenizer.bos_token_id is not None:
        written["model"]["bos_token_id"] = tokenizer.bos_token_id
    (directory / FILE).write_text(json.dumps(written, indent=2) + "\n")
