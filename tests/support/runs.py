"""Tiny training runs: encoded rows for a trainer, and files for ``train``."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from shadowtune.config.training import DataConfig, OptimizerConfig, TrainConfig
from shadowtune.data.collate import CausalCollator, ClassificationCollator
from shadowtune.model.methods import objective_of
from shadowtune.training.trainer import ShadowTrainer, with_row_numbers
from tests.support.bases import tiny_base, tiny_classifier
from tests.support.shadows import tokens
from tests.support.tokenizers import tiny_tokenizer


def causal_rows(count: int = 8) -> list[dict[str, Any]]:
    """Encoded rows of uneven length with uneven numbers of labels; one row is labelled from its first token on."""
    rows = []
    for index in range(count):
        ids = tokens(1, 6 + index % 5, seed=index)[0].tolist()
        unlabelled = 0 if index == 1 else 2 + index % 3
        rows.append({"input_ids": ids, "labels": [-100] * unlabelled + ids[unlabelled:], "row": index + 1})
    return rows


def class_rows(count: int = 8) -> list[dict[str, Any]]:
    """Encoded rows of uneven length with one of three classes."""
    return [
        {"input_ids": tokens(1, 5 + index % 4, seed=index)[0].tolist(), "labels": index % 3, "row": index + 1}
        for index in range(count)
    ]


def arguments(path: Path, **settings: Any) -> TrainingArguments:
    """Quiet arguments of a plain run on the processor: no decay, no clipping, no checkpoints unless asked for."""
    plain: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "prediction_loss_only": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(path / "out"), **{**plain, **settings})


def trainer_of(
    model: nn.Module,
    args: TrainingArguments,
    rows: list[dict[str, Any]],
    method: Any = "shadow",
    task: Any = "causal_lm",
    collate: Any = None,
    **settings: Any,
) -> ShadowTrainer:
    """A trainer over encoded rows, which it pads unless there is another collator."""
    if collate is None:
        collate = ClassificationCollator(0) if task == "classification" else CausalCollator(0)
    return ShadowTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=with_row_numbers(collate),
        objective=objective_of(method, task),
        **settings,
    )


class Gradients(TrainerCallback):
    """Copies the gradients that the first optimizer step uses."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.first:
            named = model.named_parameters()
            self.first = {name: p.grad.clone() for name, p in named if p.grad is not None}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def model_directory(path: Path, task: str = "causal_lm", **overrides: Any) -> str:
    """Save a tiny base with its tokenizer and return the directory."""
    base = tiny_classifier(**overrides) if task == "classification" else tiny_base(**overrides)
    base.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def rows_file(path: Path, count: int = 12, task: str = "causal_lm") -> str:
    """Write rows as JSON lines and return the file: sums as prompt and completion, or texts with one of 3 classes."""
    rows = []
    for index in range(count):
        text = f"add {index} and {index * index}"
        answer = {"completion": f"{index + index * index}"} if task == "causal_lm" else {"label": index % 3}
        rows.append({"prompt" if task == "causal_lm" else "text": text, **answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_config(path: Path, task: str = "causal_lm", **settings: Any) -> TrainConfig:
    """Settings of a run of 6 steps in ``path``, with the model and the rows made there if they are missing."""
    model, data = path / f"model-{task}", path / f"{task}.jsonl"
    if not model.exists():
        model_directory(model, task)
        rows_file(data, task=task)
    common: dict[str, Any] = {
        "data": DataConfig(train=str(data)),
        "model": str(model),
        "task": task,
        "output": str(path / "run"),
        "batch_size": 4,
        "epochs": 2.0,
        "logging_steps": 1,
        "optimizer": OptimizerConfig(learning_rate=1e-2),
    }
    return TrainConfig(**{**common, **settings})
