"""Plan of a training run before anything is loaded or trained: parameters, memory and time.

The model of the run is built on the meta device, and one step of each stage is counted (``model/cost.py``). With N
devices, FSDP shards weights, gradients and the optimizer's state, and holds two gathered blocks and the gathered head.
"""

import math
import random
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shadowtune.attach.architectures import architecture_of
from shadowtune.config.shapes import shapes
from shadowtune.config.training import TrainConfig
from shadowtune.data.dataset import Dataset
from shadowtune.errors import DataError
from shadowtune.model.budget import shapeless_base
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.cost import (
    BatchShape,
    StepCost,
    check_countable,
    loss_cost,
    prompt_cost,
    quantized_layers,
    training_cost,
    weight_bytes,
)
from shadowtune.model.methods import (
    load_base_config,
    make_trainable,
    objective_of,
    parameter_table,
    trainable_parameters,
)
from shadowtune.model.modeling import ShadowPreTrainedModel
from shadowtune.model.speed import Clock
from shadowtune.training.stage_settings import lora_settings, shadow_only_settings
from shadowtune.training.stages import prepare_shadow_only
from shadowtune.training.training_data import load_tokenizer

SAMPLE = 512
"""Training examples that are encoded to measure their lengths."""
BATCHES = 64
"""Random batches of the sample whose longest examples are averaged."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of examples, in tokens."""

    rows: int | None
    """Number of training examples; None if it is unknown."""
    longest: float
    """Of all examples of the sample."""
    padded: float
    """Mean length of a batch's longest example."""
    labelled: float
    """Fraction of the tokens of a padded batch that have a label."""
    row: float
    """Mean length of prompt and answer."""
    answer: float
    validation: int = 0
    """Number of validation examples."""

    def batch(self, rows: int, longest: bool = False) -> BatchShape:
        """Return the shape of a usual batch, or of that with the longest example."""
        length = self.longest if longest else self.padded
        labelled = min(1.0, self.labelled * self.padded / length)
        return BatchShape(rows, max(2, round(length)), labelled, padded=self.padded > self.row)

    @classmethod
    def given(cls, length: int, labelled: float = 1.0, rows: int | None = None) -> "Lengths":
        """Describe examples that all have the same length."""
        return cls(rows, length, length, labelled, length, labelled * length)


@dataclass(frozen=True)
class Memory:
    """Bytes of one phase on one device; ``total`` is their sum, apart from memory used at different times."""

    phase: str
    weights: int
    optimizer: int
    gradients: int
    activations: int
    """Everything else that is alive at the peak, temporary results of operations included."""
    cache: int
    total: int


@dataclass(frozen=True)
class StageTime:
    """Time of one stage of training."""

    stage: str
    steps: int | None
    """Optimizer steps; None if the number of examples is unknown."""
    step_seconds: float
    tokens_per_second: float
    """Tokens without padding, on all devices together."""
    seconds: float | None
    """With evaluations on the validation examples; None if the number of examples is unknown."""


@dataclass(frozen=True)
class RunPlan:
    """Estimates of a run."""

    parameters: list[tuple[str, int, int]]
    """(part, parameters, of these trained by some stage)."""
    trained: int
    memory: list[Memory]
    times: list[StageTime]
    clock: str
    """Where the times come from."""
    notes: list[str]
    """What is not part of the estimates."""


def measure_lengths(config: TrainConfig, sample: int = SAMPLE) -> Lengths:
    """Encode the first ``sample`` of a run's training examples, and measure them.

    Raises:
        DataError: if the examples cannot be read, or there are none.
    """
    data, classify = Dataset.open(config.data), config.task == "classification"
    rows = data.training_rows()
    tokenizer = load_tokenizer(config.model, config.revision)
    encoded = data.encode(rows[:sample], tokenizer, classify, training=True)[0]
    if not encoded:
        raise DataError(f"{config.data.source} has no training examples")
    tokens = [len(example["input_ids"]) for example in encoded]
    answers = [0 if classify else sum(label != -100 for label in example["labels"]) for example in encoded]
    row, answer = sum(tokens) / len(tokens), sum(answers) / len(answers)
    total = len(encoded) if config.data.block_size is not None and len(rows) <= sample else len(rows)
    validation = len(data.validation_rows() or []) if config.data.validation is not None else 0
    rng, size = random.Random(0), min(config.batch_size, len(tokens))
    batches = [[tokens[i] for i in rng.sample(range(len(tokens)), size)] for _ in range(BATCHES)]
    if config.padding_free:
        padded, longest = row, max(sum(batch) / size for batch in batches)
    else:
        padded, longest = sum(map(max, batches)) / BATCHES, float(max(tokens))
    return Lengths(total, longest, padded, answer / padded, row, answer, validation)


def named_config(name: str) -> PreTrainedConfig:
    """Return the config of a well-known base (``config/shapes.py``) without a download."""
    config: PreTrainedConfig = AutoConfig.for_model(**shapes()[name])
    return config


class Planner:
    """Counts the costs of runs.

    Args:
        clock: of the times.
        devices: over which FSDP shards.
        base: config of the base; None reads that of ``config.model``, which may be downloaded.
    """

    def __init__(self, clock: Clock, devices: int = 1, base: PreTrainedConfig | None = None) -> None:
        self.clock, self.devices, self.base = clock, devices, base
        self._models: dict[str, nn.Module] = {}
        self._steps: dict[tuple[int, BatchShape], StepCost] = {}

    def plan(self, config: TrainConfig, lengths: Lengths) -> RunPlan:
        """Estimate a run.

        Raises:
            ConfigError: if the costs of the base or of a setting cannot be counted.
            ShadowtuneError: if the base is missing, or the method refuses it.
        """
        stages = self._stages(config)
        whole = self._model(config)
        trained = self.trained_parameters(config)
        memory = [self._training_memory(title, stage, lengths) for title, stage in stages.items()]
        notes = [
            "the Python process and its libraries come on top, and what an allocator keeps: on a processor, glibc's "
            "heap up to 40 %, unless MALLOC_MMAP_THRESHOLD_=262144 is set"
        ]
        if config.task == "causal_lm":
            memory += self._inference_memory(config, whole, lengths)
        if config.autocast:
            notes.append("counted without autocast, which keeps some activations in 16 bits")
        if config.distills_answers or config.drafter_last:
            notes.append("without the stages in which the model answers training prompts")
        if config.task == "classification" and config.num_labels is None:
            notes.append(f"counted with {self.base_config(config).num_labels} classes; set num_labels for others")
        if self.devices > 1:
            notes.append("times without communication between devices")
        parameters = self._parameters(config, whole)
        times = [self._time(title, stage, lengths) for title, stage in stages.items()]
        return RunPlan(parameters, trained, memory, times, self.clock.source, notes)

    def trained_parameters(self, config: TrainConfig) -> int:
        """Return how many parameters some stage of a run trains."""
        if config.method == "ensemble":
            return sum(self.trained_parameters(stage) for stage in self._stages(config).values())
        return (
            trainable_parameters(self._build(config))
            if config.has_shadow_only_stage
            else trainable_parameters(self._model(config))
        )

    def seconds(self, config: TrainConfig, lengths: Lengths) -> float | None:
        """Return the seconds of all stages; None if the number of examples is unknown."""
        times = [self._time(title, stage, lengths).seconds for title, stage in self._stages(config).items()]
        return None if None in times else sum(cast(list[float], times))

    def _stages(self, config: TrainConfig) -> dict[str, TrainConfig]:
        """Return the settings of each stage that is a training run of its own, by titles."""
        if config.method == "ensemble":
            return {
                "small model": shadow_only_settings(replace(config, method="shadow")),
                "LoRA": lora_settings(config),
            }
        if config.has_shadow_only_stage:
            return {"shadow-only stage": shadow_only_settings(config), "joint stage": config}
        return {"pretraining" if config.stage == "pretrain" else "training": config}

    def base_config(self, config: TrainConfig) -> PreTrainedConfig:
        """Return the config of a run's base; raises ConfigError if its costs cannot be counted."""
        if self.base is None:
            self.base = load_base_config(config.model)
        check_countable(self.base)
        if config.num_labels is not None:
            self.base.num_labels = config.num_labels
        return self.base

    def _build(self, config: TrainConfig) -> nn.Module:
        """Build the model of a run on the meta device."""
        base_config = self.base_config(config)
        attention = "eager" if config.attention == "eager" else "sdpa"  # flash attention keeps what sdpa keeps
        dtype, trained = vars(torch)[config.base_dtype], vars(torch)[config.trainable_dtype]
        # the source of a shadow's initial values changes no shape, and there are no values here to copy
        shadow = replace(config.shadow, init_layers=None, init_from=None)
        with torch.device("meta"):
            base = shapeless_base(base_config, config.task, dtype=dtype, attn_implementation=attention)
            return make_trainable(base, config.method, config.task, shadow, config.lora, trained, config.peft)

    def _model(self, config: TrainConfig) -> nn.Module:
        """Return the model of a stage, prepared as training prepares it."""
        parts = (config.model, config.method, config.stage, config.task, config.num_labels, config.attention)
        key = repr((*parts, config.base_dtype, config.trainable_dtype, config.shadow, config.lora, config.peft))
        if key not in self._models:
            model = self._build(config)
            if config.stage == "pretrain":
                prepare_shadow_only(model)
            elif isinstance(model, ShadowPreTrainedModel):
                model.freeze_unused()
            if config.gradient_checkpointing != "off":
                reentrant = config.gradient_checkpointing == "reentrant"
                cast(PreTrainedModel, model).activation_checkpointing_enable({"use_reentrant": reentrant})
            self._models[key] = model
        return self._models[key]

    def _training_memory(self, title: str, config: TrainConfig, lengths: Lengths) -> Memory:
        model = self._model(config)
        step = self._step(config, lengths.batch(config.batch_size, longest=True))
        trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
        largest = max((each.nbytes for each in model.parameters() if each.requires_grad), default=0)
        weights = self._weights(config, model)
        optimizer, gradients = 2 * trained // self.devices, trained // self.devices
        updating = gradients + 2 * largest // self.devices  # temporary results of AdamW for one parameter
        working = max(step.peak - trained + gradients + _dequantized(config, model), updating)
        return Memory(title, weights, optimizer, gradients, working - gradients, 0, weights + optimizer + working)

    def _weights(self, config: TrainConfig, model: nn.Module) -> int:
        """Bytes of the weights on one device, with the blocks and the head that FSDP has gathered."""
        total = weight_bytes(model, config.base_quantization)
        if self.devices == 1:
            return total
        base = cast(PreTrainedModel, model.base if isinstance(model, ShadowPreTrainedModel) else model)
        blocks = architecture_of(self.base_config(config)).blocks_of(base)
        gathered = 2 * max(weight_bytes(block, config.base_quantization) for block in blocks)
        head = base.get_output_embeddings()
        if head is not None:  # which quantization leaves out
            gathered += weight_bytes(head)
        return math.ceil(total / self.devices) + gathered

    def _inference_memory(self, config: TrainConfig, model: nn.Module, lengths: Lengths) -> list[Memory]:
        """Memory of reading prompts and keeping their cache: attached, and detached if there is a shadow."""
        length = max(2, round(lengths.longest))
        found = []
        if isinstance(model, ShadowForCausalLM):
            mode = model.mode
            attached = prompt_cost(cast(nn.Module, model.set_mode("attached")), config.batch_size, length)
            model.set_mode(mode)
            plain = _detached_shape(model)
            detached = prompt_cost(plain, config.batch_size, length)
            found = [("attached, reading prompts", self._weights(config, model), attached)]
            found.append(("detached, reading prompts", weight_bytes(plain), detached))
        else:
            found = [("reading prompts", self._weights(config, model), prompt_cost(model, config.batch_size, length))]
        return [
            Memory(phase, weights, 0, 0, step.peak - step.left, step.left, weights + step.peak)
            for phase, weights, step in found
        ]

    def _parameters(self, config: TrainConfig, model: nn.Module) -> list[tuple[str, int, int]]:
        """Return the parts of the model; what an earlier stage trains counts as trained."""
        return parameter_table(self._build(config) if config.has_shadow_only_stage else model)

    def _step(self, config: TrainConfig, batch: BatchShape) -> StepCost:
        model = self._model(config)
        key = (id(model), batch)
        if key not in self._steps:
            objective = objective_of(config.method, config.task, config.peft.get("peft_type"))
            self._steps[key] = training_cost(model, batch, objective)
        return self._steps[key]

    def _time(self, title: str, config: TrainConfig, lengths: Lengths) -> StageTime:
        accumulated, model = config.gradient_accumulation_steps, self._model(config)
        step = self._step(config, lengths.batch(config.batch_size))
        batch = self.clock.seconds(step.operations)
        seconds = accumulated * batch + self.clock.optimizer_seconds(trainable_parameters(model))
        tokens = accumulated * config.batch_size * lengths.row * self.devices
        steps = self._step_count(config, lengths)
        total = None
        if steps is not None:
            total = steps * seconds + self._evaluations(config, lengths, steps) * self._evaluation(config, lengths)
        return StageTime(title, steps, seconds, tokens / seconds, total)

    def _step_count(self, config: TrainConfig, lengths: Lengths) -> int | None:
        if config.max_steps is not None:
            return config.max_steps
        if lengths.rows is None:
            return None
        batches = math.ceil(lengths.rows / (config.batch_size * self.devices))
        return math.ceil(config.epochs * math.ceil(batches / config.gradient_accumulation_steps))

    def _evaluations(self, config: TrainConfig, lengths: Lengths, steps: int) -> float:
        """Return how often training measures the loss on the validation examples."""
        if not lengths.validation or config.data.learn_validation:
            return 0
        if config.eval_steps is not None:
            return steps // config.eval_steps
        epochs = self._step_count(replace(config, max_steps=None, epochs=1.0), lengths)
        return steps if epochs is None else max(1, round(steps / epochs))

    def _evaluation(self, config: TrainConfig, lengths: Lengths) -> float:
        """Return the seconds of one evaluation."""
        objective = objective_of(config.method, config.task, config.peft.get("peft_type"))
        step = loss_cost(self._model(config), lengths.batch(config.batch_size), objective)
        batches = math.ceil(lengths.validation / (config.batch_size * self.devices))
        return batches * self.clock.seconds(step.operations)


def _dequantized(config: TrainConfig, model: nn.Module) -> int:
    """Bytes of the largest quantized weight in the precision of its product."""
    if config.base_quantization == "none":
        return 0
    return max((layer.weight.nbytes for layer in quantized_layers(model)), default=0)


def _detached_shape(model: ShadowForCausalLM) -> nn.Module:
    """Return ``model.detached()`` on the meta device."""
    shadow, base = model.shadow, model.base
    config = shadow.backbone.config.__class__.from_dict(shadow.backbone.config.to_dict())
    config.vocab_size = base.config.get_text_config(decoder=True).vocab_size
    same = not isinstance(shadow.projection, nn.Linear) and shadow.embedding is None
    tied = base.get_output_embeddings().weight is cast(Any, base.get_input_embeddings()).weight
    config.tie_word_embeddings = same and tied
    with torch.device("meta"):
        plain: nn.Module = AutoModelForCausalLM.from_config(config, dtype=shadow.boundaries.injection_downs.dtype)
    return plain
