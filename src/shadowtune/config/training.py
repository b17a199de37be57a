"""The settings of a training run, as written in a YAML file."""

from dataclasses import dataclass, field
from typing import Literal

from shadowtune.config.checking import check_range
from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.templates import parse_template
from shadowtune.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from and how they become tokens."""

    train: str
    """A JSONL file or one plain text in a .txt file (either may be gzipped), a directory of such files named after
    splits, a data set we ship ("clinc150-demo") or a Hub data set ("hub:org/name" or "hub:org/name/config")."""
    validation: str | None = None
    """Rows whose loss is measured during training; None measures none."""
    train_split: str = "train"
    """Split to train on; a single file has none."""
    validation_split: str = "validation"
    """Split to validate on; a single file has none."""
    template: str | None = None
    """How a prompt is made from a row's fields, for instance "Request: {text}\\nIntent:"; None takes a field as it is.
    In classification it makes the text."""
    prompt_field: str | None = None
    """Field of the prompt, if it is not called ``prompt``."""
    completion_field: str | None = None
    """Field of the completion, if it is not called ``completion``."""
    text_field: str | None = None
    """Field of the text, if it is not called ``text``."""
    label_field: str | None = None
    """Field of the class in classification, if it is not called ``label``."""
    max_length: int = 512
    """Tokens of prompt and completion together."""
    overlong: Literal["error", "truncate", "drop"] = "truncate"
    """What happens to longer rows. "truncate" cuts the start of the prompt, never the completion; of plain text and
    in classification, which have no prompt, it cuts the end."""
    completion_only: bool = True
    """Whether only completions (assistant turns) are learned; plain text is always learned whole."""
    chat_template: bool = True
    """Whether prompts are put into the tokenizer's chat template, if it has one."""
    block_size: int | None = None
    """Join the rows' plain texts, with the end-of-sequence token between them, and cut the whole into blocks of so many
    tokens, all learned; for causal_lm. ``max_length`` and ``overlong`` do not matter then. None keeps rows apart."""
    limit: int | None = None
    """Use only the first so many training rows."""

    def __post_init__(self) -> None:
        """Check the ranges, the template, and what does not go together."""
        check_range(self, max_length=(2, None), block_size=(2, None), limit=(1, None))
        if self.block_size is not None:
            for name in ("template", "prompt_field", "completion_field"):
                if vars(self)[name] is not None:
                    raise ConfigError(
                        f"block_size={self.block_size} joins plain texts, which have no {name}; name their field with "
                        "text_field, or leave block_size out"
                    )
        if self.template is None:
            return
        parse_template(self.template)
        if self.prompt_field is not None or self.text_field is not None:
            raise ConfigError("template replaces prompt_field and text_field; set only one of them")


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

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(
            self,
            learning_rate=(0, None),
            backbone_learning_rate=(0, None),
            weight_decay=(0, None),
            warmup_ratio=(0, 1),
            max_grad_norm=(0, None),
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: DataConfig
    """The rows."""
    model: str = "smollm2-135m"
    """The base: a directory, a Hub id, or "smollm2-135m", which comes from PyPI."""
    revision: str | None = None
    """Revision of a Hub model."""
    method: Literal["shadow", "lora", "dora", "full"] = "shadow"
    """What is trained."""
    task: Literal["causal_lm", "classification"] = "causal_lm"
    """What the model predicts: the next token, or a class."""
    num_labels: int | None = None
    """Classes in classification; None counts them in the training rows."""
    stage: Literal["task", "pretrain"] = "task"
    """What a shadow learns: a task beside its base, or ("pretrain", set by ``shadowtune pretrain``) to be a language
    model by itself, before any task, from the text (shadow.shadow_loss_weight) and from the base alone
    (shadow.distillation_weight, shadow.matching_weight). Its boundaries stay as they start."""
    projection_steps: int = 0
    """In stage "pretrain", the steps at the beginning in which only the shadow's projections are trained; its backbone
    joins them afterwards."""
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    """Settings of the method ``shadow``."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Settings of the methods ``lora`` and ``dora``."""
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
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    """What to do where the loss is NaN or infinite: stop with the rows named, or leave that optimizer step out."""

    def __post_init__(self) -> None:
        """Check the ranges and what does not go together."""
        check_range(
            self,
            num_labels=(1, None),
            projection_steps=(0, None),
            epochs=(0, None),
            max_steps=(1, None),
            batch_size=(1, None),
            gradient_accumulation_steps=(1, None),
            logging_steps=(1, None),
            save_steps=(1, None),
            eval_steps=(1, None),
            keep_checkpoints=(1, None),
            seed=(0, 2**32),
        )
        if not self.epochs > 0:
            raise ConfigError(f"epochs must be above 0, got {self.epochs!r}")
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
        if self.num_labels is not None and self.task != "classification":
            raise ConfigError(
                f"num_labels is set to {self.num_labels}, but task is {self.task}; set task=classification"
            )

    def _check_stage(self) -> None:
        """Check what goes together with pretraining."""
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
