"""The model card of a detached shadow."""

import json
from dataclasses import dataclass, field

from shadowtune.data.prompt_format import PromptFormat


@dataclass(frozen=True)
class Card:
    """What is known about a detached shadow."""

    base: str
    """Name of the base that it was trained beside."""
    task: str = "causal_lm"
    """causal_lm or classification."""
    training: dict[str, str] = field(default_factory=dict)
    """How it was trained, as the rows of a table."""
    measured: dict[str, str] = field(default_factory=dict)
    """What was measured on held-out rows, as the rows of a table."""

    def text(self, parameters: int, name: str, prompt_format: PromptFormat | None = None) -> str:
        """Return the card in Markdown, with the metadata block that the Hub reads.

        Args:
            parameters: of the model, tied ones once.
            name: of the directory, as the example shows it.
            prompt_format: of its prompts, as it was saved; None leaves them out, as for a classifier.
        """
        kind, pipeline = {
            "causal_lm": ("AutoModelForCausalLM", "text-generation"),
            "classification": ("AutoModelForSequenceClassification", "text-classification"),
        }[self.task]
        lines = ["---", "library_name: transformers", f"pipeline_tag: {pipeline}", "tags: [shadowtune]", "---", ""]
        lines += ["# Detached shadow", ""]
        lines += [
            f"A small model of {parameters:,} parameters that was trained beside {self.base or 'a larger model'} "
            "(ShadowPEFT, https://arxiv.org/abs/2604.19254) and runs without it. It is an ordinary transformers model:",
            "",
            "```python",
            f"from transformers import {kind}, AutoTokenizer",
            "",
            f"model = {kind}.from_pretrained({name!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            "```",
        ]
        if prompt_format is not None:
            lines += _prompt_section(prompt_format)
        for title, rows in (("Training", self.training), ("Measured on held-out rows", self.measured)):
            if rows:
                lines += ["", f"## {title}", "", "| | |", "|---|---|"]
                lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
        return "\n".join(lines) + "\n"


def _prompt_section(form: PromptFormat) -> list[str]:
    """Return what a reader must know to prompt the model as it was trained."""
    lines = ["", "## Prompt", ""]
    whole = form.template is not None and form.text_field is None
    if whole and form.template is not None:
        lines += [f"A chat message is the whole prompt, filled with {', '.join(form.fields)}, as in training:"]
        lines += _block(form.template)
    elif form.baked and (form.template is not None or not form.chat_template or form.tokenizer_chat_template is None):
        lines += ["The tokenizer's chat template makes the prompt of training from a chat message:"]
        lines += _block(form.template or "{text}")
    else:
        lines += ["The tokenizer's chat template makes the prompt of training."]
    lines += ["", "```python", 'messages = [{"role": "user", "content": "..."}]']
    lines += [
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "output = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
    ]
    if form.baked and (not form.chat_template or form.tokenizer_chat_template is None):
        lines += ["", "It reads one message of a user: no system message, no history."]
        if not whole and not form.further_fields:
            lines += ["", "Ollama does not read chat templates of its own making; its Modelfile needs:"]
            ollama = (form.template or "{text}").replace("{" + (form.text_field or "text") + "}", "{{ .Prompt }}")
            lines += _block(f'TEMPLATE """{ollama}"""')
    if form.further_fields and not whole:
        needed = ", ".join(
            name + (" (optional)" if name in form.optional_fields else "") for name in form.further_fields
        )
        lines += ["", f"Further parts of the prompt are arguments of the chat template by name: {needed}."]
    return lines


def _block(text: str) -> list[str]:
    fence = "```" if "```" not in text else "~~~~"
    return ["", f"{fence}text", text, fence]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def measured_accuracy(mode: str, report: str) -> dict[str, str]:
    """Return the rows of ``Card.measured`` that a JSON report of one mode gives; none if it is damaged.

    Args:
        mode: attached, detached or base.
        report: the text of the report.
    """
    try:
        (row,) = json.loads(report)["rows"]
        interval = f"(95 % interval {row['accuracy_low']:.3f} to {row['accuracy_high']:.3f})"
        return {f"accuracy, {mode}": f"{row['accuracy']:.3f} on {row['rows']} rows {interval}"}
    except (ValueError, KeyError, TypeError):
        return {}
