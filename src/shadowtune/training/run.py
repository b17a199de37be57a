"""``train``: from settings to a run directory with a trained model.

A run consists of models that are trained one after the other, each in a run directory of its own (``preceding_runs``,
then the run itself), and the training of a model consists of stages (``stages``).
"""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy, TrainOutput

from shadowtune.config.training import TrainConfig
from shadowtune.data.chat_template import save_tokenizer
from shadowtune.data.formats import describe_unread
from shadowtune.data.generation import record_ends
from shadowtune.data.labels import Labels
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
from shadowtune.model.checkpoint import write_older_keys
from shadowtune.model.deferral_files import SavedDeferralHead, write_deferral_head
from shadowtune.model.methods import (
    load_base,
    load_base_in_parts,
    make_trainable,
    objective_of,
    parameter_table,
    trainable_parameters,
)
from shadowtune.model.modeling import ShadowPreTrainedModel
from shadowtune.model.quantization import quantization_arguments
from shadowtune.provenance import peak_memory_mb, provenance
from shadowtune.training.callbacks import (
    FinishWandb,
    GracefulInterrupt,
    MetricsFile,
    ProgressLines,
    ProjectionWarmup,
    TerminalProgress,
    tensorboard_callback,
)
from shadowtune.training.checkpoints import TrainingProgress, atomic_directory, convert_write_errors
from shadowtune.training.interpolation import join_ensemble
from shadowtune.training.parallelism import (
    asks_for_sharded_loading,
    check_parallelism,
    check_same_inputs,
    converted_losses,
    own_loading,
)
from shadowtune.training.run_directory import DISTILLATION_DIRECTORY, DRAFT_HEAD_DIRECTORY, InputDigests, RunDirectory
from shadowtune.training.samples import SampleAnswers
from shadowtune.training.stage_settings import (
    distillation_settings,
    draft_head_settings,
    joint_settings,
    preceding_runs,
)
from shadowtune.training.stages import (
    DistillationStage,
    DraftHeadStage,
    StageContext,
    prepare_shadow_only,
    stages,
)
from shadowtune.training.summary import TrainSummary, read_summary, write_summary
from shadowtune.training.teacher_logits import with_teacher_logits
from shadowtune.training.trainer import ShadowTrainer, training_arguments, with_row_numbers
from shadowtune.training.training_data import (
    TrainingData,
    check_data,
    format_to_record,
    frequent_tokens,
    load_training_data,
)

_ANSWER_STAGES = {
    DistillationStage.name: (DISTILLATION_DIRECTORY, distillation_settings),
    DraftHeadStage.name: (DRAFT_HEAD_DIRECTORY, draft_head_settings),
}
"""Stages that train on the model's own answers: the directory of each in the run's, and its settings."""


@dataclass(frozen=True)
class RunOptions:
    """What happens to a run that is in the directory already, and where messages go."""

    resume: bool
    overwrite: bool
    report: Callable[[str], None]
    quiet: bool
    main: bool
    """Whether this is the first process, which alone writes."""
    sharded_loading: bool = False
    """Whether each process reads only its part of the base."""


def train(
    config: TrainConfig,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
    quiet: bool = False,
) -> TrainSummary | None:
    """Train by the settings and leave a run directory.

    Args:
        config: the settings.
        resume: continue from the last checkpoint in ``config.output``, to the same result as an uninterrupted run;
            start anew if there is none, and do nothing if the run has finished.
        overwrite: replace the run that is there.
        report: called with messages for the user; without a terminal also with the progress.
        quiet: whether to hide progress and sample answers.

    Returns:
        The costs; None in all but the first of the processes that torchrun or accelerate started.

    Raises:
        ShadowtuneError: one of its subclasses, with a message of one line.
    """
    run = RunDirectory(config.output)
    arguments = training_arguments(config, run.checkpoints, quiet)
    main = arguments.process_index == 0
    shown = report if main else lambda line: None
    options = RunOptions(resume and not overwrite, overwrite, shown, quiet, main, asks_for_sharded_loading())
    check_parallelism(config, arguments)
    if options.resume and run.is_finished(config):
        return read_summary(run.summary_file) if options.main else None
    with own_loading(), converted_losses(arguments.process_index), _claimed(run, config, options):
        if config.method == "ensemble" and arguments.world_size > 1:
            raise ConfigError("method=ensemble trains in one process; start one")
        before = []
        for title, settings in preceding_runs(config).items():
            options.report(title)
            before.append(_train_preceding(settings, options))
        if config.method == "ensemble":
            return _finish_ensemble(config, run, options, before)
        if before:
            options.report("joint stage")
        return ModelRun(config, run, options, shadow_only=before[0] if before else None).train()


def _train_preceding(config: TrainConfig, options: RunOptions) -> TrainSummary | None:
    run = RunDirectory(config.output)
    if options.resume and run.is_finished(config):
        return read_summary(run.summary_file) if options.main else None
    with _claimed(run, config, options):
        summary = ModelRun(config, run, options).train()
        if options.main and config.stage == "pretrain":  # its length may not change, so that nothing resumes from them
            run.remove_checkpoints()
        return summary


@contextlib.contextmanager
def _claimed(run: RunDirectory, config: TrainConfig, options: RunOptions) -> Iterator[None]:
    """Context in which a run directory is locked and may be written."""
    with run.locked() if options.main else contextlib.nullcontext():
        if options.main:
            run.check(config, options.resume, options.overwrite)
        yield


class ModelRun:
    """The training of one model in its run directory.

    Args:
        config: settings of the run.
        run: its directory.
        options: of ``train``.
        shadow_only: costs of the run of the shadow-only stage, if one precedes.
    """

    def __init__(
        self, config: TrainConfig, run: RunDirectory, options: RunOptions, shadow_only: TrainSummary | None = None
    ) -> None:
        self.config, self.run, self.options, self.shadow_only = config, run, options, shadow_only
        arguments = training_arguments(config, run.checkpoints, options.quiet)
        self.data = load_training_data(config)
        self._report_data()
        settings = joint_settings(config) if config.has_shadow_only_stage else config
        device = arguments.device if options.sharded_loading else None
        base = load_run_base(settings, self.data.num_labels, self.data.labels, device)
        digests = InputDigests.of(base, self.data)
        settings_read = {f"the setting {name}": value for name, value in asdict(config).items()}
        packages = {"the versions of installed packages": provenance()["versions"]}
        check_same_inputs({**settings_read, **digests.described(), **packages}, arguments.world_size)
        if options.main and options.resume:
            run.check_inputs(digests)
        self.model = build_model(settings, self.data.num_labels, base)
        check_data(self.data, self.model)
        generation_config = self.model.generation_config if config.task == "causal_lm" else None
        self.form = format_to_record(self.data, generation_config)
        record_ends(self.model, self.form.ends)
        self.trained_parameters = self._prepare_model()
        with arguments.main_process_first(local=False):
            if options.main:
                run.begin(config, options.resume)
                digests.save(run.path)
        self.interrupt = GracefulInterrupt()
        self.trainer = self._trainer(config, run, arguments, self.data)
        self.progress = TrainingProgress()
        self.deferral_head: SavedDeferralHead | None = None

    def train(self) -> TrainSummary | None:
        """Run all stages, then save the model and, as the sign that the run has finished, the summary."""
        entries: dict[str, Any] = {}
        context = self._context()
        with self.interrupt.watching(), convert_write_errors(self.run.path, self.run.checkpoints):
            for stage in stages(self.config):
                entries |= stage.run(context)
                record_ends(self.model, self.form.ends)  # transformers has put the tokenizer's end token there
        self.deferral_head = context.deferral_head
        summary = self._summary(entries)
        self._save(summary)
        if not self.options.main:
            return None
        write_summary(self.run.summary_file, summary)
        if self.config.keep_checkpoints == 0:
            self.run.remove_checkpoints()
        return summary

    def _report_data(self) -> None:
        data, report = self.data, self.options.report
        ends = data.tokenizer.convert_ids_to_tokens(list(data.prompt_format.ends))
        if data.deferral is not None:
            report(f"{len(data.deferral):,} of the examples are set aside for the deferral head")
        if data.formats:
            report(f"read as {data.formats}")
        report(f"data: {data.report}" + (f"; answers end in {', '.join(ends)}" if ends else ""))
        if data.unread:
            report(f"warning: no setting reads {describe_unread(data.unread)} of the training rows")

    def _prepare_model(self) -> int:
        """Set the draft vocabulary, report and freeze parameters; return how many some stage trains."""
        config, model = self.config, self.model
        on_task = config.stage == "task"
        if config.draft_vocabulary is not None and on_task and isinstance(model, ShadowForCausalLM):
            model.set_draft_vocabulary(frequent_tokens(self.data.train, config.draft_vocabulary))
        for part, total, trained in parameter_table(model):
            self.options.report(f"parameters: {part}: {total:,} of which trainable {trained:,}")
        before = trainable_parameters(model)
        if on_task and isinstance(model, ShadowPreTrainedModel):
            model.freeze_unused()
        return before if config.has_shadow_only_stage else trainable_parameters(model)

    def _context(self) -> StageContext:
        config, data, report = self.config, self.data, self.options.report
        dataset: Any = data.train
        if config.distillation_cache is not None:
            dataset = with_teacher_logits(config, self.model, data, self.trainer.accelerator, report)
        fixed = (self.model, dataset, self._fit, data.validation, data.collate, data.tokenizer, config.batch_size)
        return StageContext(*fixed, report, data.deferral)

    def _fit(self, stage: str, dataset: Any) -> TrainOutput:
        """Train in a stage: those on the model's own answers in directories of their own, all else in the run's."""
        if stage in _ANSWER_STAGES:
            return self._answers_trainer(stage, dataset).train()
        self.trainer.train_dataset = dataset
        output: TrainOutput = self.trainer.train(resume_from_checkpoint=self.run.last_checkpoint())
        self.progress = self.trainer.progress()
        state = self.trainer.state
        if self.config.compares_losses and state.best_metric is not None:
            kept = "its" if self.config.load_best_model_at_end else "the last step's"
            self.options.report(
                f"best {self.config.metric_for_best_model} on the validation examples: {state.best_metric:.4g} at step "
                f"{state.best_global_step} of {state.global_step}; {kept} weights are kept"
            )
        return output

    def _answers_trainer(self, stage: str, dataset: Any) -> ShadowTrainer:
        directory, settings_of = _ANSWER_STAGES[stage]
        run, settings = RunDirectory(self.run.path / directory), settings_of(self.config)
        arguments = training_arguments(settings, run.checkpoints, self.options.quiet)
        arguments.save_strategy = SaveStrategy.NO
        if self.options.main:
            shutil.rmtree(run.path, ignore_errors=True)
            run.path.mkdir()
        return self._trainer(settings, run, arguments, replace(self.data, train=dataset, validation=None))

    def _trainer(
        self, config: TrainConfig, run: RunDirectory, arguments: TrainingArguments, data: TrainingData
    ) -> ShadowTrainer:
        callbacks: list[TrainerCallback] = [MetricsFile(run.metrics_file)]
        if "tensorboard" in config.trackers and arguments.process_index == 0:
            callbacks.append(tensorboard_callback(run.tensorboard, run.last_checkpoint()))
        if "wandb" in config.trackers:
            callbacks.append(FinishWandb())
        if config.projection_steps:
            callbacks.append(ProjectionWarmup(self.model, config.projection_steps))
        if config.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
        report = (lambda line: None) if self.options.quiet else self.options.report
        bar = None if arguments.disable_tqdm else TerminalProgress(report)
        report = report if bar is None else bar.write
        callbacks.append(ProgressLines(report))
        if config.samples and config.evaluates:
            callbacks.append(self._samples(run, report))
        trainer = ShadowTrainer(
            model=self.model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=with_row_numbers(data.collate),
            processing_class=data.tokenizer,
            callbacks=[*callbacks, self.interrupt],
            objective=objective_of(config.method, config.task, config.peft.get("peft_type")),
            backbone_learning_rate=config.optimizer.backbone_learning_rate,
            lora_plus_ratio=config.optimizer.lora_plus_ratio,
            skip_nonfinite=config.nonfinite_loss == "skip",
            keep_checkpoints=config.keep_checkpoints,
        )
        trainer.remove_callback(PrinterCallback if bar is None else ProgressCallback)
        if bar is not None:
            trainer.add_callback(bar)
        if trainer.shards_weights and trainer.pop_callback(SampleAnswers) is not None:
            report("no sample answers: one process alone cannot generate with a sharded model")
        return trainer

    def _samples(self, run: RunDirectory, report: Callable[[str], None]) -> SampleAnswers:
        modes: tuple[str, ...] = ("model",)
        if isinstance(self.model, ShadowPreTrainedModel):
            modes = ("detached",) if self.config.stage == "pretrain" else ("attached", "detached")
        data = replace(self.data, prompt_format=self.form)
        return SampleAnswers(run.samples_file, self.model, data, self.config.samples, modes, report)

    def _summary(self, entries: dict[str, Any]) -> TrainSummary:
        """Combine the entries of the stages with the costs that the trainer has counted."""
        config, progress, state = self.config, self.progress, self.trainer.state
        losses, measured = (
            [line[name] for line in state.log_history if name in line] for name in ("loss", "eval_loss")
        )
        perplexity = None
        if config.stage == "pretrain" and measured:  # the last one comes after the last step
            loss = state.best_metric if config.load_best_model_at_end and state.best_metric else measured[-1]
            perplexity = math.exp(min(loss, 700.0))  # beyond it a float overflows
        shadow_seconds = None if self.shadow_only is None else self.shadow_only.train_seconds
        later = sum(entries.get(f"{name}_seconds", 0.0) for name in ("distillation", "fit", "drafting", "deferral"))
        return TrainSummary(
            method=config.method,
            trainable_parameters=self.trained_parameters,
            train_seconds=(shadow_seconds or 0.0) + progress.seconds + later,
            tokens_per_second=progress.tokens / progress.seconds,
            peak_memory_mb=peak_memory_mb(),
            skipped_steps=progress.skipped_steps,
            detached_perplexity=perplexity,
            shadow_seconds=shadow_seconds,
            best_step=state.best_global_step if config.compares_losses else None,
            best_metric=state.best_metric if config.compares_losses else None,
            **{**entries, "final_loss": losses[-1] if losses else entries["final_loss"]},
        )

    def _save(self, summary: TrainSummary) -> None:
        """Write the trained model, its tokenizer, prompt format and model card."""
        config, run, trainer, form = self.config, self.run, self.trainer, self.form
        model: Any = trainer.model
        with atomic_directory(run.model, trainer.accelerator, run.checkpoints) as staging:
            trainer.save_model(str(staging))
            if not trainer.args.should_save:
                return
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
            if config.method in ("lora", "dora", "peft"):  # PEFT writes none, but a classifier's head needs one
                model.config.save_pretrained(staging)
            if config.task == "classification":
                form.save(staging)
            else:
                form = save_tokenizer(self.data.tokenizer, form, staging)
            write_older_keys(staging)
            if self.deferral_head is not None:
                write_deferral_head(self.deferral_head, staging)
            self._write_card(staging, form, summary)

    def _write_card(self, directory: Path, form: PromptFormat, summary: TrainSummary) -> None:
        config, tokenizer = self.config, self.data.tokenizer
        prompt = ""
        if config.task == "causal_lm" and config.stage == "task" and form.answers:
            prompt = describe_prompt(form, tokenizer)
        measured, conditions = training_costs(asdict(summary)), measuring_conditions(provenance())
        card = Card(config.model, config.task, training_facts(config), measured, conditions, prompt)
        kind: Form = "attached" if config.method == "shadow" else "full" if config.method == "full" else "adapter"
        chat = form.has_saved_template(tokenizer)
        write_card(directory, card, kind, self.run.model.name, chat, summary.trainable_parameters)


def load_run_base(
    config: TrainConfig,
    num_labels: int | None = None,
    labels: Labels | None = None,
    parts: torch.device | None = None,
) -> PreTrainedModel:
    """Load the base of a run, after seeding: a head for other classes is initialized at random.

    Args:
        config: the settings of the run.
        num_labels: number of classes of a classifier.
        labels: their names and kind, for its config.
        parts: device of this process's part of the base, which alone is read; None reads the whole base.
    """
    dtype = vars(torch)[config.base_dtype]
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attention}
    kwargs |= quantization_arguments(config.base_quantization, dtype)
    if config.revision is not None:
        kwargs["revision"] = config.revision
    if num_labels is not None:
        named = {} if labels is None else labels.model_arguments(num_labels)
        kwargs |= {"num_labels": num_labels, "ignore_mismatched_sizes": True, **named}
    set_seed(config.seed)
    if parts is not None:
        return load_base_in_parts(config.model, config.task, parts, **kwargs)
    return load_base(config.model, config.task, **kwargs)


def build_model(config: TrainConfig, num_labels: int | None = None, base: PreTrainedModel | None = None) -> nn.Module:
    """Return the model to train: the base, loaded if it is not given, with the adapter of the run's method."""
    base = load_run_base(config, num_labels) if base is None else base
    dtype = vars(torch)[config.trainable_dtype]
    model = make_trainable(base, config.method, config.task, config.shadow, config.lora, dtype, config.peft)
    return prepare_shadow_only(model, config.projection_steps) if config.stage == "pretrain" else model


def _finish_ensemble(
    config: TrainConfig, run: RunDirectory, options: RunOptions, parts: list[TrainSummary | None]
) -> TrainSummary:
    """Fit the weight of an ensemble whose two models are trained, and write both."""
    small, lora = parts
    assert small is not None and lora is not None
    run.begin(config, options.resume)
    with atomic_directory(run.model, Accelerator()) as staging:
        runs = [Path(settings.output) for settings in preceding_runs(config).values()]
        fit_seconds = join_ensemble(config, (runs[0], runs[1]), staging, options.report)
    summary = replace(
        lora,
        method=config.method,
        trainable_parameters=small.trainable_parameters + lora.trainable_parameters,
        train_seconds=small.train_seconds + lora.train_seconds + fit_seconds,
        peak_memory_mb=peak_memory_mb(),
        skipped_steps=small.skipped_steps + lora.skipped_steps,
        shadow_seconds=small.train_seconds,
        fit_seconds=fit_seconds,
    )
    write_summary(run.summary_file, summary)
    return summary
