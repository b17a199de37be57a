"""Tokenizers whose chat templates have the shape of real ones, and tiny runs that learn their rows by heart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import DataConfig, OptimizerConfig, TrainConfig
from shadowtune.training.run import train
from tests.support.bases import tiny_base
from tests.support.tokenizers import CHATML, EOS, tiny_tokenizer

STOP = "<|stop|>"
"""A special token that is neither the tokenizer's end token nor, in the tiny bases, the model's."""
CHATML_STOP = CHATML.replace("<|im_end|>", STOP)
"""ChatML whose turns end in a token of their own."""
QWEN3 = (
    "{%- if tools %}{{- '<|im_start|>system\\nTools: ' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- set ns = namespace(last=0) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{%- set content = message.content if message.content is string else '' %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > ns.last %}"
    "{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<call>' + call.function.name + ' ' }}{{- call.function.arguments | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
"""Qwen3's: an empty block of thoughts before the last answer, none before earlier ones; tools and tool calls."""
GPT_OSS = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}"
    "{{- '<|return|>' if loop.last else '<|end|>' }}"
    "{%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
"""GPT-OSS's: a channel before each answer, and another end for the last turn than for earlier ones."""
R1 = (
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{- 'User ' + message.content }}{%- endif %}"
    "{%- if message.role == 'assistant' %}{{- ' Assistant ' + message.content.split('</think>')[-1] + eos_token }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- ' Assistant <think>\\n' }}{%- endif %}"
)
"""R1-Distill's: the generation prompt opens a block that finished turns do not have."""
PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Knows only messages that are lists of parts."""
WRAPPING = (
    "{% for message in messages %}{{ message.role + ' ' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
"""Ends no turn with a token."""
ADDED = (STOP, "<think>", "</think>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<call>")


def chat_tokenizer(
    chat_template: str | None = CHATML, add_bos: bool = False, add_eos: bool = False
) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the added tokens of real chat templates, and 97 tokens at most.

    Args:
        chat_template: a Jinja template; None makes a tokenizer without one.
        add_bos: whether texts start with the begin token.
        add_eos: whether the post-processor puts the end token behind texts.
    """
    tokenizer = tiny_tokenizer(chat_template, add_bos)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in (*ADDED,)])
    if add_eos:
        begin = f"{tokenizer.bos_token} " if add_bos else ""
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, EOS)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin}$A {EOS}", special_tokens=special
        )
    return tokenizer


def learned_run(
    path: Path,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    steps: int = 60,
    base: dict[str, Any] | None = None,
    method: Any = "shadow",
    report: Callable[[str], None] = lambda line: None,
    **data: Any,
) -> Path:
    """Train a tiny model until it knows its rows by heart; returns the run directory."""
    model = tiny_base(**(base or {}))
    model.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        data=DataConfig(train=str(path / "rows.jsonl"), **data),
        model=str(path / "base"),
        method=method,
        shadow=ShadowConfig(shadow_loss_weight=1.0, num_shadow_layers=2),
        output=str(path / "run"),
        batch_size=len(rows),
        max_steps=steps,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    )
    train(config, report=report, quiet=True)
    return path / "run"
