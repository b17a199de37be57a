"""Tiny random bases of every supported architecture: small enough to test everything, odd enough to catch mistakes."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

VOCABULARY = 97
WIDTH = 32
BLOCKS = 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 16},
    "qwen2": _GROUPED,
    "qwen3": _HEADS,
    "smollm3": {**_GROUPED, "no_rope_layer_interval": 2},
    "gemma2": {**_HEADS, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {
        **_HEADS,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "granite": {**_GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": BLOCKS,
        "n_head": 4,
        "n_positions": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": _COMMON,
    "opt": {
        **{name: value for name, value in _COMMON.items() if name != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": WIDTH,
        "dropout": 0.0,
    },
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_HEADS, **_EXPERTS},
    "gpt_oss": {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "qwen3_next": {
        **_HEADS,
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
"""Arguments of each architecture's config class."""


def fill(module: torch.nn.Module, seed: int, scale: float = 0.5) -> None:
    """Overwrite every parameter and float buffer that is saved with reproducible numbers, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            if tensor.ndim == 1:
                tensor.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
            else:
                tensor.copy_(noise * scale / tensor.shape[-1] ** 0.5)


def tiny_config(model_type: str = "llama", **overrides: Any) -> Any:
    """The config of a tiny base; ``overrides`` replace its values."""
    return AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **overrides})


def tiny_base(model_type: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny causal language model with reproducible weights, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides))
    fill(model, seed)
    model.tie_weights()
    return model.eval()


def tiny_classifier(model_type: str = "llama", num_labels: int = 3, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny sequence classifier with reproducible weights, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(tiny_config(model_type, num_labels=num_labels, **overrides))
    fill(model, seed)
    return model.eval()
