"""``train``: from settings to a run directory."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import SaveStrategy

from shadowtune.config.training import TrainConfig
from shadowtune.data.baking import save_prompts
from shadowtune.data.ends import record_ends
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ConfigError
from shadowtune.export.card import (
    Card,
    Form,
    describe_prompt,
    measuring_conditions,
    training_costs,
    training_facts,
    write_card,
)
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.checkpoint import writing_into
from shadowtune.model.methods import (
    load_base,
    make_trainable,
    objective_of,
    parameter_table,
    trainable_parameters,
)
from shadowtune.model.older_versions import write_older_keys
from shadowtune.model.pair import ShadowPair
from shadowtune.model.quantization import quantization_arguments
from shadowtune.provenance import peak_memory_mb, provenance
from shadowtune.training import drafting, ensemble
from shadowtune.training.arguments import training_arguments
from shadowtune.training.checkpoints import whole_directory, writing_run
from shadowtune.training.inputs import TrainingInputs
from shadowtune.training.interruption import StopBetweenSteps
from shadowtune.training.metrics import MetricsFile
from shadowtune.training.mixing import fit_head_mixing
from shadowtune.training.pretraining import ProjectionsFirst, set_up_pretraining, taught_rows
from shadowtune.training.rows import (
    TrainingRows,
    check_rows,
    format_to_record,
    frequent_tokens,
    load_training_rows,
)
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
        ends = rows.tokenizer.convert_ids_to_tokens(list(rows.prompt_format.ends))
        report(f"data: {rows.report}" + (f"; answers end in {', '.join(ends)}" if ends else ""))
        if rows.unread:
            report(f"warning: no setting reads {', '.join(rows.unread)} of the training rows")
        settings = together(config) if config.shadow_first else config
        base = load_run_base(settings, rows.num_labels)
        inputs = TrainingInputs.of(base, rows) if main else None
        if inputs is not None and resume:
            run.check_inputs(inputs)
        model = build_model(settings, rows.num_labels, base)
        check_rows(rows, model)
        form = format_to_record(rows, model.generation_config if config.task == "causal_lm" else None)
        _stop_at(model, form)
        if config.draft_vocabulary is not None and config.stage == "task" and isinstance(model, ShadowForCausalLM):
            model.set_draft_vocabulary(frequent_tokens(rows.train, config.draft_vocabulary))
        for part, total, trained in parameter_table(model):
            report(f"parameters: {part}: {total:,} of which trainable {trained:,}")
        before = trainable_parameters(model)
        if config.stage == "task" and isinstance(model, ShadowPair):
            model.freeze_unused()
        trained = before if config.shadow_first else trainable_parameters(model)
        with arguments.main_process_first(local=False):
            if inputs is not None:
                run.begin(config, resume)
                inputs.save(run.path)
        trainer = make_trainer(config, run, arguments, model, rows)
        if config.distillation_cache is not None:
            trainer.train_dataset = taught_rows(config, model, rows, trainer.accelerator, report)
        interrupt = StopBetweenSteps()
        trainer.add_callback(interrupt)
        with interrupt.watching(), writing_run(run.path, run.checkpoints):
            output = trainer.train(resume_from_checkpoint=run.last_checkpoint())
            _stop_at(model, form)  # transformers has put the tokenizer's end token into the generation config
            fitted = _fit_head_mixing(config, model, rows, report) if config.fits_head_mixing else None
            taught = _teach_drafter(config, run, model, rows, report, quiet) if config.drafter_last else None
            _stop_at(model, form)
        seconds = (taught, fitted)
        return _finish(config, run, trainer, rows.tokenizer, form, output.training_loss, trained, first, seconds)


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


def _stop_at(model: Any, form: PromptFormat) -> None:
    """Write the format's end tokens into the model's generation config."""
    if form.ends:
        record_ends(model, form.ends)


def load_run_base(config: TrainConfig, num_labels: int | None = None) -> PreTrainedModel:
    """Load the base of a run, seeded: a head for other classes starts at random."""
    dtype = vars(torch)[config.base_dtype]
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attention}
    kwargs |= quantization_arguments(config.base_quantization, dtype)
    if config.revision is not None:
        kwargs["revision"] = config.revision
    if num_labels is not None:
        kwargs |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}  # a head for other classes starts anew
    set_seed(config.seed)
    return load_base(config.model, config.task, **kwargs)


def build_model(config: TrainConfig, num_labels: int | None = None, base: PreTrainedModel | None = None) -> nn.Module:
    """Make the base of a run, which may be loaded already, trainable with the run's method."""
    base = load_run_base(config, num_labels) if base is None else base
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
    answered = drafting.own_answers(model, rows.tokenizer, chosen, report)
    own = replace(rows, train=answered, validation=None)
    with drafting.only_the_drafter(model):
        make_trainer(settings, place, arguments, model, own).train()
    return time.perf_counter() - start


def _finish(
    config: TrainConfig,
    run: RunDirectory,
    trainer: ShadowTrainer,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptFormat,
    training_loss: float,
    trained: int,
    first: TrainSummary | None,
    seconds: tuple[float | None, float | None],
) -> TrainSummary | None:
    """Write the trained model and then, as the sign that the run has finished, the summary.

    ``trained`` counts the parameters that some part of the run trained; ``seconds`` are those of teaching the drafter
    and of fitting the weight of the shadow's logits.
    """
    model: Any = trainer.model
    progress = trainer.progress()
    losses, measured = (
        [line[name] for line in trainer.state.log_history if name in line] for name in ("loss", "eval_loss")
    )
    perplexity = None
    if config.stage == "pretrain" and measured:  # the last one comes after the last step
        perplexity = math.exp(min(measured[-1], 700.0))  # beyond it a float overflows
    summary = TrainSummary(
        method=config.method,
        trainable_parameters=trained,
        steps=trainer.state.global_step,
        train_seconds=progress.seconds + (0.0 if first is None else first.train_seconds),
        tokens_per_second=progress.tokens / progress.seconds,
        peak_memory_mb=peak_memory_mb(),
        final_loss=losses[-1] if losses else training_loss,
        skipped_steps=progress.skipped_steps,
        detached_perplexity=perplexity,
        shadow_seconds=None if first is None else first.train_seconds,
        drafting_seconds=seconds[0],
        fit_seconds=seconds[1],
    )
    with whole_directory(run.model, trainer.accelerator, run.checkpoints) as staging:
        trainer.save_model(str(staging))
        if trainer.args.should_save:
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
            if config.method in ("lora", "dora", "peft"):  # PEFT writes none, but a classifier's head needs one
                model.config.save_pretrained(staging)
            saved = form
            if config.task == "classification":
                form.save(staging)
            else:
                saved = save_prompts(tokenizer, form, staging)
            write_older_keys(staging)
            _write_card(config, staging, run.model.name, tokenizer, saved, summary)
    if trainer.args.process_index != 0:
        return None
    _write_summary(run, summary)
    return summary


def _write_card(
    config: TrainConfig,
    directory: Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptFormat,
    summary: TrainSummary,
) -> None:
    """Write the model card of a run that has just ended."""
    prompt = ""
    if config.task == "causal_lm" and config.stage == "task" and prompts.answers:
        prompt = describe_prompt(prompts, tokenizer)
    measured, conditions = training_costs(asdict(summary)), measuring_conditions(provenance())
    card = Card(config.model, config.task, training_facts(config), measured, conditions, prompt)
    form: Form = "attached" if config.method == "shadow" else "full" if config.method == "full" else "adapter"
    chat = prompts.has_saved_template(tokenizer)
    write_card(directory, card, form, name, chat, summary.trainable_parameters)


def _write_summary(run: RunDirectory, summary: TrainSummary) -> None:
    """Write what a run cost, which says that it has finished."""
    with writing_into(run.path) as staging:
        (staging / run.summary_file.name).write_text(json.dumps(asdict(summary), indent=2) + "\n")
