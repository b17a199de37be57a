"""Keys under which transformers 4 looks for what transformers 5 writes under other names."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

TOKENIZER_CONFIG = "tokenizer_config.json"


def keep_rope_theta(config: PreTrainedConfig) -> None:
    """Let ``save_pretrained`` write the base of the rotations as ``rope_theta`` too, as transformers 4 reads it.

    Without it transformers 4 takes the default of the architecture, without a warning.
    """
    rope = vars(config).get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), int | float):
        config.rope_theta = rope["rope_theta"]


def write_older_keys(directory: Path) -> None:
    """Add to a saved model's ``config.json`` and ``tokenizer_config.json`` what transformers 4 needs.

    These are ``rope_theta`` and ``rope_scaling`` beside ``rope_parameters``, and names of tokenizer settings that both
    versions read. Rotations that differ between layers are left alone: transformers 4 has no common keys for them.
    """
    for name, change in ((CONFIG_NAME, _rope), (TOKENIZER_CONFIG, _tokenizer)):
        file = directory / name
        if file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
            change(values)
            file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _rope(values: dict[str, Any]) -> None:
    rope = values.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return
    values["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":  # transformers 5 takes these for rope_parameters: both are equal
        values["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}


def _tokenizer(values: dict[str, Any]) -> None:
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Version 4 adds token_type_ids by default, which causal language models refuse.
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(values.get("extra_special_tokens"), list):  # transformers 4 has a mapping under this name
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
