"""``genai_config.json``, by which onnxruntime-genai opens a directory with ``model.onnx``.

The keys are those of https://onnxruntime.ai/docs/genai/reference/config.html.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from shadowtune.data.answers import end_tokens
from shadowtune.export.gguf_file import head_width_of

FILE = "genai_config.json"


def write_genai_config(model: PreTrainedModel, tokenizer: Tokenizer, directory: Path, graph: str) -> None:
    """Describe an exported graph to onnxruntime-genai.

    Args:
        model: that was exported.
        tokenizer: written into the same directory.
        directory: with the graph.
        graph: name of its file.
    """
    config: Any = model.config
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph,
        "head_size": head_width_of(config),
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
    }
    described = {
        "type": config.model_type,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "eos_token_id": ends,
        "pad_token_id": pad if pad is not None else (ends or [0])[0],
        "decoder": decoder,
    }
    if config.bos_token_id is not None:
        described["bos_token_id"] = config.bos_token_id
    # The graph concatenates its caches, so past and present cannot share one buffer.
    search = {"do_sample": False, "max_length": config.max_position_embeddings, "past_present_share_buffer": False}
    (directory / FILE).write_text(json.dumps({"model": described, "search": search}, indent=2) + "\n")
