"""``train``: from settings to a run directory."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import SaveStrategy

from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.checkpoint import writing_into
from shadowtune.model.methods import (
    load_base,
    make_trainable,
    objective_of,
    parameter_table,
    trainable_parameters,
)
from shadowtune.model.quantization import quantization_arguments
from shadowtune.provenance import peak_memory_mb
from shadowtune.training import drafting, ensemble
from shadowtune.training.arguments import training_arguments
from shadowtune.training.checkpoints import whole_directory
from shadowtune.training.interruption import StopBetweenSteps
from shadowtune.training.metrics import MetricsFile
from shadowtune.training.mixing import fit_head_mixing
from shadowtune.training.pretraining import ProjectionsFirst, set_up_pretraining, taught_rows
from shadowtune.training.rows import TrainingRows, check_rows, frequent_tokens, load_training_rows
from shadowtune.training.run_dir import RunDirectory
from shadowtune.training.shadow_first import alone, together
from shadowtune.training.trainer import ShadowTrainer, with_row_numbers


@dataclass(frozen=True)
class TrainSummary:
    """What a run cost."""

    method: str
    trainable_parameters: int
    steps: int
    train_seconds: float
    """Wall-clock time of the training loop, validation and checkpoints included; of all parts of a resumed run, and of
    the epochs in which the shadow learned alone."""
    tokens_per_second: float
    """Tokens that went through the model, padding left out, on all processes together, per second of the training loop
    (of that with the base, if the shadow learned alone first)."""
    peak_memory_mb: float
    """Of this process, the model's loading included."""
    final_loss: float
    """The last training loss in the log: a mean over ``logging_steps`` steps."""
    skipped_steps: int
    """Optimizer steps left out because a gradient was no number."""
    detached_perplexity: float | None = None
    """exp of the detached shadow's loss on the validation rows after pretraining; None where it was not measured."""
    shadow_seconds: float | None = None
    """The part of ``train_seconds`` in which the shadow learned alone; None without ``shadow_epochs``."""
    drafting_seconds: float | None = None
    """What the drafter's own epochs took on top, the answers it learns from included; None without them."""
    fit_seconds: float | None = None
    """The part of ``train_seconds`` in which a weight of logits was fitted on validation rows; None where none was."""


def train(
    config: TrainConfig,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
    quiet: bool = False,
) -> TrainSummary | None:
    """Train as ``config`` says and leave a run directory.

    Args:
        config: the settings.
        resume: go on from the last checkpoint of ``config.output``, to the same result as an uninterrupted run; start
            anew if there is none, and do nothing if the run has finished.
        overwrite: replace the run that is there.
        report: called with lines for the user: data, parameters.
        quiet: whether to show no progress bar.

    Returns:
        What it cost; None in all but the first of the processes that torchrun or accelerate started.

    Raises:
        ShadowtuneError: one of its kinds, with one line that says what is wrong.
    """
    run = RunDirectory(config.output)
    arguments = training_arguments(config, run.checkpoints, quiet)
    main = arguments.process_index == 0
    report = report if main else lambda line: None
    resume = resume and not overwrite
    if resume and run.is_finished(config):
        return TrainSummary(**json.loads(run.summary_file.read_text())) if main else None
    with run.locked() if main else contextlib.nullcontext():
        if main:
            run.check(config, resume, overwrite)
        if config.method == "ensemble":
            return _train_ensemble(config, run, resume, overwrite, report, quiet)
        first = None
        if config.shadow_first:
            report("the shadow alone")
            first = train(alone(config), resume, overwrite, report, quiet)
            report("base and shadow together")
        rows = load_training_rows(config)
        report(f"data: {rows.report}")
        model = build_model(together(config) if config.shadow_first else config, rows.num_labels)
        check_rows(rows, model)
        if config.draft_vocabulary is not None and config.stage == "task" and isinstance(model, ShadowForCausalLM):
            model.set_draft_vocabulary(frequent_tokens(rows.train, config.draft_vocabulary))
        for part, total, trained in parameter_table(model):
            report(f"parameters: {part}: {total:,} of which trainable {trained:,}")
        with arguments.main_process_first(local=False):
            if main:
                run.begin(config, resume)
        trainer = make_trainer(config, run, arguments, model, rows)
        if config.distillation_cache is not None:
            trainer.train_dataset = taught_rows(config, model, rows, trainer.accelerator, report)
        interrupt = StopBetweenSteps()
        trainer.add_callback(interrupt)
        with interrupt.watching():
            output = trainer.train(resume_from_checkpoint=run.last_checkpoint())
            fitted = _fit_head_mixing(config, model, rows, report) if config.fit_head_mixing else None
            taught = _teach_drafter(config, run, model, rows, report, quiet) if config.drafter_last else None
        return _finish(config, run, trainer, output.training_loss, first, taught, fitted)


def _train_ensemble(
    config: TrainConfig,
    run: RunDirectory,
    resume: bool,
    overwrite: bool,
    report: Callable[[str], None],
    quiet: bool,
) -> TrainSummary | None:
    """Train the two models of an ensemble, each as a run of its own, and join them."""
    settings = training_arguments(config, run.checkpoints, quiet)
    if settings.world_size > 1:
        raise ConfigError("method=ensemble trains in one process; start one")
    report("the small model alone")
    small = train(ensemble.small_model(config), resume, overwrite, report, quiet)
    report("LoRA")
    lora = train(ensemble.adapters(config), resume, overwrite, report, quiet)
    assert small is not None and lora is not None
    run.begin(config, resume)
    with whole_directory(run.model, Accelerator()) as staging:
        fitted = ensemble.join(config, staging, report)
    summary = replace(
        lora,
        method=config.method,
        trainable_parameters=small.trainable_parameters + lora.trainable_parameters,
        train_seconds=small.train_seconds + lora.train_seconds + fitted,
        peak_memory_mb=peak_memory_mb(),
        skipped_steps=small.skipped_steps + lora.skipped_steps,
        shadow_seconds=small.train_seconds,
        fit_seconds=fitted,
    )
    _write_summary(run, summary)
    return summary


def build_model(config: TrainConfig, num_labels: int | None = None) -> nn.Module:
    """Load the base of a run and make it trainable with the run's method, seeded."""
    dtype = vars(torch)[config.base_dtype]
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attention}
    kwargs |= quantization_arguments(config.base_quantization, dtype)
    if config.revision is not None:
        kwargs["revision"] = config.revision
    if num_labels is not None:
        kwargs |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}  # a head for other classes starts anew
    set_seed(config.seed)
    base = load_base(config.model, config.task, **kwargs)
    trained_in = vars(torch)[config.trainable_dtype]
    model = make_trainable(base, config.method, config.task, config.shadow, config.lora, trained_in, config.peft)
    return set_up_pretraining(model, config.projection_steps) if config.stage == "pretrain" else model


def make_trainer(
    config: TrainConfig, run: RunDirectory, arguments: TrainingArguments, model: nn.Module, rows: TrainingRows
) -> ShadowTrainer:
    """Put model, rows and settings into a Trainer that writes into the run directory."""
    callbacks: list[TrainerCallback] = [MetricsFile(run.metrics_file)]
    if config.tensorboard and arguments.process_index == 0:
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(str(run.tensorboard))))
    if config.projection_steps:
        callbacks.append(ProjectionsFirst(model, config.projection_steps))
    trainer = ShadowTrainer(
        model=model,
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        data_collator=with_row_numbers(rows.collate),
        processing_class=rows.tokenizer,
        callbacks=callbacks,
        objective=objective_of(config.method, config.task, config.peft.get("peft_type")),
        backbone_learning_rate=config.optimizer.backbone_learning_rate,
        lora_plus_ratio=config.optimizer.lora_plus_ratio,
        skip_nonfinite=config.nonfinite_loss == "skip",
        keep_checkpoints=config.keep_checkpoints,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _fit_head_mixing(config: TrainConfig, model: nn.Module, rows: TrainingRows, report: Callable[[str], None]) -> float:
    """Choose the weight of the shadow's own logits on the validation rows; return the seconds."""
    start = time.perf_counter()
    assert isinstance(model, ShadowForCausalLM) and rows.validation is not None
    best, alone = fit_head_mixing(model, rows.validation, rows.collate, config.batch_size)
    gamma = model.shadow.config.head_mixing or 0.0
    report(f"head_mixing {gamma:g}: loss {best:.4g} on the validation rows, without it {alone:.4g}")
    return time.perf_counter() - start


def _teach_drafter(
    config: TrainConfig,
    run: RunDirectory,
    model: nn.Module,
    rows: TrainingRows,
    report: Callable[[str], None],
    quiet: bool,
) -> float:
    """Train the drafter on the model's own answers; return the seconds. An interrupted run does it from its start."""
    start = time.perf_counter()
    assert isinstance(model, ShadowForCausalLM)
    place, settings = RunDirectory(run.path / drafting.DIRECTORY), drafting.settings_of(config)
    arguments = training_arguments(settings, place.checkpoints, quiet)
    arguments.save_strategy = SaveStrategy.NO
    if arguments.process_index == 0:
        shutil.rmtree(place.path, ignore_errors=True)
        place.path.mkdir()
    chosen = drafting.chosen_rows(config, rows.train)
    own = replace(rows, train=drafting.own_answers(model, rows.tokenizer, chosen, report), validation=None)
    with drafting.only_the_drafter(model):
        make_trainer(settings, place, arguments, model, own).train()
    return time.perf_counter() - start


def _finish(
    config: TrainConfig,
    run: RunDirectory,
    trainer: ShadowTrainer,
    training_loss: float,
    first: TrainSummary | None,
    drafting_seconds: float | None,
    fit_seconds: float | None,
) -> TrainSummary | None:
    """Write the trained model and then, as the sign that the run has finished, the summary."""
    model: Any = trainer.model
    progress = trainer.progress()
    with whole_directory(run.model, trainer.accelerator) as staging:
        trainer.save_model(str(staging))
        if trainer.args.should_save:
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
            if config.method in ("lora", "dora", "peft"):  # PEFT writes none, but a classifier's head needs one
                model.config.save_pretrained(staging)
    if trainer.args.process_index != 0:
        return None
    losses, measured = (
        [line[name] for line in trainer.state.log_history if name in line] for name in ("loss", "eval_loss")
    )
    perplexity = None
    if config.stage == "pretrain" and measured:  # the last one comes after the last step
        perplexity = math.exp(min(measured[-1], 700.0))  # beyond it a float overflows
    summary = TrainSummary(
        method=config.method,
        trainable_parameters=trainable_parameters(model),
        steps=trainer.state.global_step,
        train_seconds=progress.seconds + (0.0 if first is None else first.train_seconds),
        tokens_per_second=progress.tokens / progress.seconds,
        peak_memory_mb=peak_memory_mb(),
        final_loss=losses[-1] if losses else training_loss,
        skipped_steps=progress.skipped_steps,
        detached_perplexity=perplexity,
        shadow_seconds=None if first is None else first.train_seconds,
        drafting_seconds=drafting_seconds,
        fit_seconds=fit_seconds,
    )
    _write_summary(run, summary)
    return summary


def _write_summary(run: RunDirectory, summary: TrainSummary) -> None:
    """Write what a run cost, which says that it has finished."""
    with writing_into(run.path) as staging:
        (staging / run.summary_file.name).write_text(json.dumps(asdict(summary), indent=2) + "\n")
