"""Model cards (README.md) of saved models: a description, the prompt, example code, training settings, measurements."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase as Tokenizer

from shadowtune.config.training import TrainConfig
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.models import NAMED

FILE = "README.md"
YOUR_TEXT = "your text"
"""Placeholder of a request."""
Form = Literal["attached", "adapter", "full", "detached", "onnx", "gguf"]
"""Form of a saved model: a shadow with its base, an adapter of PEFT, a whole model, or the detached shadow in a format
of ``shadowtune export``."""
PAPER = "(ShadowPEFT, https://arxiv.org/abs/2604.19254)"
DETACHED = f"A small model{{size}} that was trained beside {{base}} {PAPER} and runs without it."
FORMS: dict[Form, tuple[str, str | None, str, str]] = {
    "attached": (
        "shadowtune",
        "adapter",
        "Shadow adapter",
        f"A shadow{{size}}, trained beside the frozen {{base}} {PAPER}. Both together answer; the base is loaded by "
        "its name.",
    ),
    "adapter": ("peft", "adapter", "Adapter", "An adapter{size} for the frozen {base}."),
    "full": ("transformers", "finetune", "Fine-tuned model", "A model{size}, fine-tuned from {base}."),
    "detached": ("transformers", None, "Detached shadow", f"{DETACHED} It is an ordinary transformers model:"),
    "onnx": ("onnxruntime", None, "Detached shadow, ONNX", DETACHED),
    "gguf": ("llama.cpp", None, "Detached shadow, GGUF", DETACHED),
}
"""Of each form: library and relation to the base, in the Hub's terms; title; description."""
TASKS = {
    "causal_lm": ("text-generation", "AutoModelForCausalLM"),
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
}
"""Of each task: the Hub's pipeline tag, and the class that loads a model."""

_MESSAGES = f'messages = [{{"role": "user", "content": "{YOUR_TEXT}"}}]'
_EXPORTED = f"""from pathlib import Path

from shadowtune.export.loading import load_model

model = load_model(Path(<name>))
{_MESSAGES}
prompt = model.prompt_format.encode(messages, model.tokenizer)
answer = model.runtime.generate(prompt, 64, model.ends)
print(model.tokenizer.decode(answer, skip_special_tokens=True))"""
_PROMPT = f'inputs = tokenizer("{YOUR_TEXT}", return_tensors="pt", return_token_type_ids=False)'
_CHAT = f"""{_MESSAGES}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
_GENERATE = """output = model.generate(**inputs, max_new_tokens=64)
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_CLASSIFY = f"""inputs = tokenizer("{YOUR_TEXT}", return_tensors="pt")
label = model(input_ids=inputs["input_ids"]).logits.argmax(-1).item()
print(model.config.id2label[label])"""


@dataclass(frozen=True)
class Card:
    """Facts about a trained model, whatever form it is saved in."""

    base: str
    """Name of the base that it was trained beside."""
    task: str = "causal_lm"
    """causal_lm or classification."""
    training: dict[str, str] = field(default_factory=dict)
    """Training settings, as rows of a table."""
    measured: dict[str, str] = field(default_factory=dict)
    """Measurements, as rows of a table."""
    conditions: str = ""
    """Conditions of the measurements: hardware, versions, date."""
    prompt: str = ""
    """Description of how a request becomes the model's prompt, in Markdown."""

    def text(self, parameters: int | None, name: str, form: Form = "detached", chat: bool = False) -> str:
        """Return the card in Markdown, with the metadata block that the Hub reads.

        Args:
            parameters: number of saved parameters, tied ones once; None leaves it out.
            name: of the directory, for the example code.
            form: of the saved model.
            chat: whether the saved tokenizer has a chat template, for the example code.
        """
        library, relation, title, description = FORMS[form]
        base, size = self.base or "a larger model", "" if parameters is None else f" of {parameters:,} parameters"
        lines = ["---", f"library_name: {library}", f"pipeline_tag: {TASKS[self.task][0]}"]
        if self.base:
            lines.append(f"base_model: {json.dumps(self.base, ensure_ascii=False)}")
            lines += [f"base_model_relation: {relation}"] if relation else []
        lines += ["tags:", "- shadowtune", "- ShadowPEFT", f"- {form}", "---", "", f"# {title}", ""]
        lines += [description.format(size=size, base=base), "", "```python", self._example(name, form, chat), "```"]
        if form == "onnx":
            lines += ["", "onnxruntime-genai (`Model(directory)`) and optimum (`ORTModelForCausalLM`) open it as well."]
        if self.prompt:
            lines += ["", "## Prompt", "", self.prompt]
        for section, facts in (("Training", self.training), ("Measured", self.measured)):
            if facts:
                lines += ["", f"## {section}", "", "| | |", "|---|---|"]
                lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items()]
        if self.measured and self.conditions:
            lines += ["", f"Measured on {self.conditions}."]
        return "\n".join(lines) + "\n"

    def _example(self, name: str, form: Form, chat: bool) -> str:
        """Return code that answers one request, to run in the directory above the saved model."""
        if form in ("onnx", "gguf"):
            return _EXPORTED.replace("<name>", repr(name))
        auto, classifies = TASKS[self.task][1], self.task == "classification"
        imports, loading = (
            f"from transformers import {auto}, AutoTokenizer",
            f"model = {auto}.from_pretrained({name!r})",
        )
        if form == "attached":
            imports = f"import shadowtune  # registers the model with transformers\n{imports}"
        if form == "adapter":
            base = json.dumps(self.base, ensure_ascii=False)
            settings = f", config=AutoConfig.from_pretrained({name!r}), ignore_mismatched_sizes=True"
            imports = f"from peft import PeftModel\n{imports}"
            if classifies:
                imports = imports.replace(f"import {auto}", f"import AutoConfig, {auto}")
            if self.base in NAMED:
                imports, base = f"import shadowtune\n{imports}", f"shadowtune.models.resolve({base})"
            loading = f"base = {auto}.from_pretrained({base}{settings if classifies else ''})\n"
            loading += f"model = PeftModel.from_pretrained(base, {name!r})"
        request = _CLASSIFY if classifies else f"{_CHAT if chat else _PROMPT}\n{_GENERATE}"
        return f"{imports}\n\n{loading}\ntokenizer = AutoTokenizer.from_pretrained({name!r})\n{request}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def describe_prompt(form: PromptFormat, tokenizer: Tokenizer) -> str:
    """Describe in Markdown how to prompt the model as it was trained.

    Args:
        form: format of the prompts, as it is saved beside the model.
        tokenizer: with the chat template that it had before training.
    """
    whole = form.template is not None and form.text_field is None
    if whole and form.template is not None:
        lines = [f"A chat message is the whole prompt, filled with {', '.join(form.fields)}, as in training:"]
        lines += _block(form.template)
    else:
        needed = [name for name in form.further_fields if name not in form.optional_fields]
        fields = {name: "{" + name + "}" for name in needed}
        ids = form.encode([{"role": "user", "content": YOUR_TEXT}], tokenizer, fields=fields)
        lines = [f'The request "{YOUR_TEXT}" becomes this prompt:', *_block(str(tokenizer.decode(ids)))]
    if form.baked and not form.takes_conversations(tokenizer):
        lines += [
            "",
            "The saved chat template makes it. It reads one message of a user: no system message, no history.",
        ]
        if not whole and not form.further_fields:
            ollama = (form.template or "{text}").replace("{" + (form.text_field or "text") + "}", "{{ .Prompt }}")
            lines += ["", "Ollama does not read chat templates of its own making; its Modelfile needs:"]
            lines += _block(f'TEMPLATE """{ollama}"""')
    if form.further_fields and not whole:
        named = [name + (" (optional)" if name in form.optional_fields else "") for name in form.further_fields]
        lines += ["", f"Further parts of the prompt are arguments of the chat template by name: {', '.join(named)}."]
    return "\n".join(lines)


def _block(text: str) -> list[str]:
    fence = "```" if "```" not in text else "~~~~"
    return ["", f"{fence}text", text, fence]


def training_facts(config: TrainConfig) -> dict[str, str]:
    """Return ``Card.training`` of a run's settings."""
    facts = {
        "method": config.method,
        "data": config.data.source,
        "epochs": f"{config.epochs:g}" if config.max_steps is None else f"{config.max_steps} steps",
        "batch size": str(config.batch_size * config.gradient_accumulation_steps),
        "learning rate": f"{config.optimizer.learning_rate:g}",
        "seed": str(config.seed),
    }
    if config.method == "shadow":
        shadow = config.shadow
        facts["shadow"] = f"{shadow.num_shadow_layers} blocks, loss weight {shadow.shadow_loss_weight:g}"
    return facts


def training_costs(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries of ``Card.measured`` that a run's ``summary.json`` has."""
    formats = {
        "training loss": ("final_loss", "{:.4g}, at the end"),
        "training time": ("train_seconds", "{:,.1f} s"),
        "training speed": ("tokens_per_second", "{:,.0f} tokens/s"),
        "training memory": ("peak_memory_mb", "{:,.0f} MB at most"),
    }
    return {
        name: form.format(summary[key])
        for name, (key, form) in formats.items()
        if isinstance(summary.get(key), int | float)
    }


def measuring_conditions(provenance: Mapping[str, Any]) -> str:
    """Return ``Card.conditions`` of a record of ``shadowtune.provenance``."""
    versions = provenance.get("versions") or {}
    known = {name: versions[name] for name in ("shadowtune", "torch", "transformers", "peft") if name in versions}
    devices = provenance.get("devices") or []
    hardware = ", ".join(devices) or f"{provenance.get('processor')}, {provenance.get('threads')} threads"
    software = ", ".join(f"{name} {version}" for name, version in known.items())
    commit = f", commit {provenance['commit']}" if provenance.get("commit") else ""
    return f"{hardware}, {software}, {provenance.get('date')}{commit}"


def measured_accuracy(mode: str, report: str) -> dict[str, str]:
    """Return the entry of ``Card.measured`` that a JSON report of one mode gives; none if it is damaged.

    Args:
        mode: attached, detached or base.
        report: the text of the report.
    """
    try:
        document = json.loads(report)
        (row,) = document["rows"]
        interval = f"(95 % interval {row['accuracy_low']:.3f} to {row['accuracy_high']:.3f})"
        value = f"{row['accuracy']:.3f} on {row['rows']} rows {interval}"
        if document.get("provenance"):
            value += f"; {measuring_conditions(document['provenance'])}"
        return {f"accuracy, {mode}": value}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def write_card(directory: Path, card: Card, form: Form, name: str, chat: bool, parameters: int | None) -> None:
    """Write README.md into a directory that is being saved, over one that another library wrote there.

    Args:
        directory: with the saved files.
        card: facts about the model.
        form: of the saved model.
        name: final name of the directory.
        chat: whether the saved tokenizer has a chat template.
        parameters: as for ``Card.text``.
    """
    (directory / FILE).write_text(card.text(parameters, name, form, chat), encoding="utf-8")


def read_card(directory: Path, task: str = "causal_lm") -> Card:
    """Read the card of a saved model, to write it again for another form; what it lacks stays empty.

    Args:
        directory: with a README.md of ``write_card``, another one, or none.
        task: of the model.
    """
    try:
        lines = (directory / FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return Card("", task)
    base, conditions, section = "", "", ""
    tables: dict[str, dict[str, str]] = {"## Training": {}, "## Measured": {}}
    for line in lines:
        if line.startswith('base_model: "') and line.endswith('"') and not base:
            base = str(json.loads(line.removeprefix("base_model: ")))
        elif line.startswith("## "):
            section = line
        elif section in tables and line.startswith("| ") and line.endswith(" |") and line != "| | |":
            key, _, value = line[2:-2].replace("\\|", "\0").partition(" | ")
            tables[section][key.replace("\0", "|")] = value.replace("\0", "|")
        elif section == "## Measured" and line.startswith("Measured on "):
            conditions = line.removeprefix("Measured on ").removesuffix(".")
    return Card(base, task, tables["## Training"], tables["## Measured"], conditions)
