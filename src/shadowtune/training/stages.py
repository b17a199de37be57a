"""Training stages: the steps by which one model is trained, each behind the same interface.

``train`` runs ``stages(config)`` in order. Beside another trainer, plain or from TRL, one call runs the recommended
ones in place of ``trainer.train()``; the model may be one of this package or of its PEFT method:

    trainer = SFTTrainer(model, args=arguments, train_dataset=dataset, eval_dataset=hold_out)
    train_in_stages(trainer)

or each stage by itself: ``ShadowOnlyStage().run(StageContext.from_trainer(trainer))``.

``DraftHeadStage`` needs a trainer that takes the model's own loss, as ``transformers.Trainer`` does and TRL's do not.
"""

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import SaveStrategy, TrainOutput

from shadowtune.config.training import SHADOW_STAGE, OptimizerConfig, TrainConfig
from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.data.generation import generate_answers
from shadowtune.errors import ConfigError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.deferral_files import SavedDeferralHead
from shadowtune.model.modeling import ShadowPreTrainedModel
from shadowtune.training.deferral import DeferralHeadStage
from shadowtune.training.interpolation import fit_logit_interpolation
from shadowtune.training.training_data import Collator


@dataclass
class StageContext:
    """The model and data that stages work on, and how to train."""

    model: Any
    train_dataset: Any
    """Encoded examples."""
    fit: Callable[[str, Any], TrainOutput]
    """(name of the stage, data set) -> trains the trainable parameters of ``model`` on the data set."""
    eval_dataset: Any = None
    """Encoded hold-out examples, for ``LogitInterpolationStage``."""
    collate: Collator | None = None
    """Makes batches of hold-out examples."""
    tokenizer: Any = None
    """For ``DraftHeadStage`` and ``DeferralHeadStage``."""
    batch_size: int = 8
    report: Callable[[str], None] = lambda line: None
    """Called with messages."""
    deferral_examples: Any = None
    """Encoded examples for ``DeferralHeadStage`` that the networks have not learned; None takes ``eval_dataset``."""
    deferral_head: SavedDeferralHead | None = None
    """Result of ``DeferralHeadStage``."""

    @classmethod
    def from_trainer(cls, trainer: Trainer, **changes: Any) -> "StageContext":
        """Take model, data and arguments from a trainer; each stage trains with a new trainer of the same class.

        Args:
            trainer: of a model of this package, or of a ``PeftModel`` of its PEFT method.
            **changes: training arguments that replace the trainer's.
        """
        arguments = copy.copy(trainer.args)
        for name, value in changes.items():
            setattr(arguments, name, value)
        shared: dict[str, Any] = {
            "model": trainer.model,
            "args": arguments,
            "eval_dataset": trainer.eval_dataset,
            "data_collator": trainer.data_collator,
            "processing_class": trainer.processing_class,
        }
        return cls(
            _shadow_model(trainer.model),
            trainer.train_dataset,
            lambda stage, dataset: type(trainer)(train_dataset=dataset, **shared).train(),
            trainer.eval_dataset,
            trainer.data_collator,
            trainer.processing_class,
            trainer.args.per_device_eval_batch_size,
        )


def train_in_stages(
    trainer: Trainer,
    shadow_epochs: float = SHADOW_STAGE["shadow_epochs"],
    shadow_learning_rate: float = SHADOW_STAGE["shadow_learning_rate"],
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a language model by the recommended recipe, in place of ``trainer.train()``.

    First the shadow learns by itself, with the recipe's warm-up and weight decay. Then ``trainer.train()`` trains the
    boundaries; the shadow's loss is left out and its backbone frozen where the boundaries do not read its state
    (``variant`` "stateless"), else lambda counts. At the end the weight of the shadow's logits is fitted, if the
    trainer has an ``eval_dataset``.

    Args:
        trainer: ``transformers.Trainer`` or TRL's ``SFTTrainer``.
        shadow_epochs: epochs of the first stage, which costs a small part of a joint one.
        shadow_learning_rate: its peak learning rate.
        report: called with messages.

    Returns:
        Entries of ``TrainSummary``: steps and final loss of the joint stage, seconds of the fit.

    Raises:
        ConfigError: if the trainer's model is not a language model with a shadow.
    """
    with recommended_stages(trainer, shadow_epochs, shadow_learning_rate, report=report) as entries:
        entries |= _training_entries(trainer.train())
    return entries


@contextmanager
def recommended_stages(
    trainer: Trainer,
    shadow_epochs: float = SHADOW_STAGE["shadow_epochs"],
    shadow_learning_rate: float = SHADOW_STAGE["shadow_learning_rate"],
    resumed: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Context in which another program calls ``trainer.train()``, with the other stages of the recipe around it.

    Args:
        trainer: ``transformers.Trainer`` or TRL's ``SFTTrainer``.
        shadow_epochs: epochs of the first stage; 0 leaves it out, and the joint loss keeps the shadow's.
        shadow_learning_rate: its peak learning rate.
        resumed: whether the first stage is done already, in the run whose checkpoint is resumed.
        report: called with messages.

    Yields:
        Entries of ``TrainSummary``; at the end the seconds of the fit are added.

    Raises:
        ConfigError: if the trainer's model is not a language model with a shadow.
    """
    model = _shadow_model(trainer.model)
    if not isinstance(model, ShadowForCausalLM):
        raise ConfigError(
            f"train_in_stages trains a language model with a shadow, but the trainer has a {type(model).__name__}; "
            "classifiers are trained by trainer.train()"
        )
    if shadow_epochs and not resumed:
        recipe = OptimizerConfig()
        shadow_only_arguments = {
            "num_train_epochs": shadow_epochs,
            "max_steps": -1,
            "learning_rate": shadow_learning_rate,
            "warmup_steps": recipe.warmup_ratio,  # below 1: a share of the steps
            "weight_decay": recipe.weight_decay,
            "save_strategy": SaveStrategy.NO,
            "load_best_model_at_end": False,
        }
        ShadowOnlyStage().run(StageContext.from_trainer(trainer, **shadow_only_arguments))
    config, entries = model.shadow.config, dict[str, Any]()
    with _restored_requires_grad(model):
        try:
            if config.variant == "stateless" and shadow_epochs:
                model.shadow.config = replace(config, shadow_loss_weight=0.0, shadow_loss_weight_end=None)
                model.freeze_unused()
            yield entries
        finally:
            model.shadow.config = config
    if trainer.eval_dataset is not None:
        context = StageContext.from_trainer(trainer)
        context.report = report
        entries |= LogitInterpolationStage().run(context)


def _shadow_model(model: Any) -> Any:
    """Return the model of this package inside of a ``PeftModel``; others as they are."""
    if not is_peft_model(model):
        return model
    from shadowtune.peft import shadow_model_of

    return shadow_model_of(model)


class Stage(Protocol):
    """One step of training."""

    name: str

    def applies(self, config: TrainConfig) -> bool:
        """Whether a run with these settings has this stage."""
        ...

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train or fit something; returns its entries of ``TrainSummary``."""
        ...


def stages(config: TrainConfig) -> list[Stage]:
    """Return the stages of a run, in order."""
    every: tuple[Stage, ...] = (
        ShadowOnlyStage(distillation=True),
        JointStage(),
        DistillationStage(),
        LogitInterpolationStage(),
        DraftHeadStage(config.drafting_epochs, config.seed),
        DeferralHeadStage(),
    )
    return [stage for stage in every if stage.applies(config)]


@dataclass(frozen=True)
class ShadowOnlyStage:
    """Trains the shadow as a language model by itself; its boundaries and the base stay as they are.

    It costs a small part of a joint step, for the base does not run. So it may take several passes over the data, which
    a small network needs, and the boundaries then learn beside a state that already knows the task.

    Args:
        distillation: whether to learn from the base as well, by the weights of ``ShadowConfig``; then the base runs.
    """

    distillation: bool = False
    name = "shadow_only"

    def applies(self, config: TrainConfig) -> bool:
        """In pretraining, and in the run that precedes the joint stage (``preceding_runs``)."""
        return config.stage == "pretrain"

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train the backbone and projections in mode "detached"."""
        with shadow_only(context.model, self.distillation):
            return _training_entries(context.fit(self.name, context.train_dataset))


@dataclass(frozen=True)
class JointStage:
    """Trains shadow and boundaries beside the base; of other methods, their adapters or the whole model."""

    name = "joint"

    def applies(self, config: TrainConfig) -> bool:
        """In every run on a task."""
        return config.stage == "task"

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train all trainable parameters."""
        return _training_entries(context.fit(self.name, context.train_dataset))


@dataclass(frozen=True)
class DistillationStage:
    """Trains the shadow alone on greedy answers of the attached model to the training prompts.

    Sequence-level distillation (Kim and Rush, 2016, https://arxiv.org/abs/1606.07947) on the teacher's own outputs: a
    small network fits one model's answers more easily than the many ways in which data answer. Boundaries that read h
    alone (``variant: stateless``) leave the attached model as it is meanwhile; others would change with the state.
    """

    name = "distillation"

    def applies(self, config: TrainConfig) -> bool:
        """Where ``distillation_epochs`` is set."""
        return config.distills_answers

    def run(self, context: StageContext) -> dict[str, Any]:
        """Generate the answers and train on them in mode "detached". An interrupted run starts this stage anew.

        Raises:
            ConfigError: without a tokenizer, or if the boundaries read the shadow's state.
        """
        if context.model.shadow.config.variant != "stateless":
            raise ConfigError(
                "distillation trains the shadow after the joint stage, which changes an attached model whose "
                "boundaries read the shadow's state; set shadow.variant=stateless"
            )
        return {"distillation_seconds": _fit_own_answers(context, self.name, context.train_dataset, shadow_only)}


@dataclass(frozen=True)
class LogitInterpolationStage:
    """Chooses the weight of the shadow's own logits in the attached model's on hold-out data."""

    name = "logit_interpolation"

    def applies(self, config: TrainConfig) -> bool:
        """Where ``fit_logit_interpolation`` is set."""
        return config.fits_logit_interpolation

    def run(self, context: StageContext) -> dict[str, Any]:
        """Set ``logit_interpolation`` of the model; see ``fit_logit_interpolation``."""
        start = time.perf_counter()
        if context.eval_dataset is None or context.collate is None:
            raise ConfigError("the weight of the shadow's logits is fitted on validation data: give an eval_dataset")
        fit = fit_logit_interpolation(context.model, context.eval_dataset, context.collate, context.batch_size)
        context.report(
            f"logit_interpolation {fit.gamma:g}: loss {fit.loss:.4g} on the validation data, "
            f"{fit.loss_without:.4g} without it"
        )
        return {"fit_seconds": time.perf_counter() - start}


@dataclass(frozen=True)
class DraftHeadStage:
    """Trains the draft head on greedy answers of the attached model to the training prompts; nothing else changes.

    In speculative decoding drafts are verified against the model's own output, not against the data.

    Args:
        epochs: below 1, the share of the prompts that are answered; from 1 on, all are.
        seed: of the choice of prompts.
    """

    epochs: float = 1.0
    seed: int = 42
    name = "draft_head"

    def applies(self, config: TrainConfig) -> bool:
        """Where ``drafting_epochs`` is set."""
        return config.drafter_last

    def run(self, context: StageContext) -> dict[str, Any]:
        """Generate the answers and train on them. An interrupted run starts this stage anew."""
        chosen = self.choose(context.train_dataset)
        return {"drafting_seconds": _fit_own_answers(context, self.name, chosen, draft_head_only)}

    def choose(self, examples: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Return the examples whose prompts are answered."""
        if self.epochs >= 1:
            return examples
        return random.Random(self.seed).sample(list(examples), math.ceil(self.epochs * len(examples)))


def _fit_own_answers(
    context: StageContext,
    stage: str,
    examples: Sequence[dict[str, Any]],
    trainable: Callable[[Any], AbstractContextManager[None]],
) -> float:
    """Let the attached model answer the prompts of examples, and train on the answers.

    Args:
        context: of the stage.
        stage: its name.
        examples: encoded, with labels.
        trainable: context of a model in which only what the stage trains is trainable.

    Returns:
        The seconds that both took.
    """
    start, title = time.perf_counter(), stage.replace("_", " ")
    if context.tokenizer is None:
        raise ConfigError(f"the {title} stage learns the model's own answers, which need a tokenizer")
    with trainable(context.model):
        pass  # if there is nothing to train, the error comes before the answers
    context.report(f"{title}: the model answers {len(examples)} training prompts")
    answered = own_answers(context.model, context.tokenizer, examples)
    with trainable(context.model):
        context.fit(stage, answered)
    return time.perf_counter() - start


def _training_entries(output: TrainOutput) -> dict[str, Any]:
    return {"steps": output.global_step, "final_loss": output.training_loss}


def prepare_shadow_only(model: nn.Module, projection_steps: int = 0) -> ShadowPreTrainedModel:
    """Set mode "detached" and freeze what belongs to the attached model: boundaries and draft head.

    Boundaries that start with W_up = 0 keep the attached model equal to its base.

    Raises:
        ConfigError: if ``projection_steps`` is set and the shadow has no projections.
    """
    assert isinstance(model, ShadowPreTrainedModel)
    if projection_steps and not isinstance(model.shadow.projection, nn.Linear):
        raise ConfigError(
            f"projection_steps={projection_steps} trains the shadow's projections first, but it has none, because its "
            "hidden_size is the base's; set projection_steps=0, or another shadow.hidden_size"
        )
    model.shadow.boundaries.requires_grad_(False)
    if model.shadow.draft_head is not None:
        model.shadow.draft_head.requires_grad_(False)
    return model.set_mode("detached")


@contextmanager
def shadow_only(model: ShadowPreTrainedModel, distillation: bool = False) -> Iterator[None]:
    """Context in which a model is its detached shadow, which is trainable, and nothing else is.

    Args:
        model: with a shadow.
        distillation: whether the loss has the distillation and matching terms of ``ShadowConfig``.
    """
    mode, config = model.mode, model.shadow.config
    with _restored_requires_grad(model):
        try:
            if not distillation:
                model.shadow.config = replace(config, distillation_weight=0.0, matching_weight=0.0)
            model.shadow.requires_grad_(True)  # the joint stage may have had no use for its backbone
            prepare_shadow_only(model)
            yield
        finally:
            model.set_mode(mode).shadow.config = config


@contextmanager
def draft_head_only(model: ShadowForCausalLM) -> Iterator[None]:
    """Context in which only the draft head is trainable."""
    head = model.shadow.draft_head
    if head is None:
        raise ConfigError("this shadow has no draft head; set ShadowConfig.draft_rank, such as 64")
    with _restored_requires_grad(model):
        model.requires_grad_(False)
        head.requires_grad_(True)
        yield


@contextmanager
def _restored_requires_grad(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


def own_answers(
    model: ShadowForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Answer the prompts of encoded examples greedily; return examples with these answers as labels.

    Args:
        model: in mode "attached"; left in eval mode.
        tokenizer: of the model.
        examples: with ``input_ids`` and ``labels``; the tokens before the first label, at least one, are the prompt.
    """
    prompts = []
    for example in examples:
        labels = enumerate(example["labels"])
        begin = next(position for position, label in labels if position and label != IGNORE_INDEX)
        prompts.append(list(example["input_ids"][:begin]))
    longest = max(len(each["input_ids"]) - len(prompt) for each, prompt in zip(examples, prompts, strict=True))
    _, answers = generate_answers(model, tokenizer, prompts, longest)
    return [
        {**example, "input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}
        for example, prompt, answer in zip(examples, prompts, answers, strict=True)
    ]
