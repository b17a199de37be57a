"""The model card of a detached shadow."""

import json
from dataclasses import dataclass, field


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

    def text(self, parameters: int, name: str) -> str:
        """Return the card in Markdown, with the metadata block that the Hub reads.

        Args:
            parameters: of the model, tied ones once.
            name: of the directory, as the example shows it.
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
        for title, rows in (("Training", self.training), ("Measured on held-out rows", self.measured)):
            if rows:
                lines += ["", f"## {title}", "", "| | |", "|---|---|"]
                lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
        return "\n".join(lines) + "\n"


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
