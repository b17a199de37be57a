"""Base class of the shadow models: a frozen base, its shadow, three modes, and the forward pass of both networks."""

import contextlib
import copy
import inspect
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import TransformersKwargs
from typing_extensions import Self

from shadowtune.attach.architectures import Architecture, architecture_of, check_unwrapped
from shadowtune.attach.cache import cache_of_base, split_cache
from shadowtune.attach.forward import begin_call, check_fit, install_hooks
from shadowtune.attach.sharded_loading import as_parts
from shadowtune.attach.sharding import device_of, gather_during_forward, take_layout
from shadowtune.compatibility import CACHE_NAMES, commit_of, set_cache, takes_cache
from shadowtune.config.settings import nearest
from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import ShadowState
from shadowtune.core.losses import JointLoss, LossWeights
from shadowtune.errors import ConfigError
from shadowtune.model.adapters import NamedAdapters
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.fingerprint import base_fingerprint, base_signature
from shadowtune.model.initialization import start_shadow
from shadowtune.model.loading import absolute_name, check_save_keywords, load_model, record_resized_base, save_model
from shadowtune.model.quantization import keep_differentiable
from shadowtune.model.reference import ReferenceModel
from shadowtune.model.shadow import Shadow
from shadowtune.model.trainer_losses import HeadlessModel

Mode = Literal["attached", "detached", "base"]
"""What a model computes: base and shadow together, the shadow alone with the base's head, or the base alone."""
PASSED_ON = ("cache_position", "mm_token_type_ids", "return_dict", "token_type_ids", "tokenizer")
"""Keywords that tokenizers, trainers, ``generate`` and earlier versions of transformers send to every model."""


MERGE_ERROR = (
    "a shadow cannot be merged into its base: its correction depends on the input, so no weights of the base equal it; "
    "detached() returns the shadow as a plain small model, and a base without its shadow is as it was"
)


class ShadowPreTrainedModel(NamedAdapters):
    """A frozen base and a trainable shadow; base class of the task models."""

    config_class = ShadowModelConfig
    config: ShadowModelConfig
    base_model_prefix = "trunk"
    supports_gradient_checkpointing = True
    auto_base: ClassVar[Any]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = list(CACHE_NAMES)

    def __init__(self, config: ShadowModelConfig, base: PreTrainedModel | None = None, shadow: Any = None) -> None:
        super().__init__(config)
        assert config.base_config is not None and config.backbone_config is not None
        self.base = self.auto_base.from_config(copy.deepcopy(config.base_config)) if base is None else base
        if shadow is None:
            sizes = (config.base_config, config.backbone_config)
            shadow = Shadow(config.shadow_config, *sizes, draft_vocabulary_size=config.draft_vocabulary_size)
        check_fit(self.base, shadow.boundaries)
        check_marker(config.shadow_config.injection_after, self.vocab_size)
        self.base.requires_grad_(False)
        keep_differentiable(self.base)
        self.shadow: Shadow = shadow
        self.mode: Mode = "attached"
        self._init_adapters()
        config._attn_implementation = self.base.config._attn_implementation
        self._known_keywords = known_keywords(self, self.architecture.decoder_of(self.base), shadow.backbone)
        self.post_init()
        take_layout(self, self.base)
        gather_during_forward(self, self._parameters_read_in_forward())
        for handle in install_hooks(self.base):
            weakref.finalize(self, handle.remove).atexit = False

    @classmethod
    def from_base(
        cls, base: PreTrainedModel, config: ShadowConfig | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Make a model of a base and a new shadow.

        Args:
            base: a pretrained model; it is frozen, and otherwise unchanged. Several shadows may share it. One that was
                sharded at loading (``DistributedConfig(fsdp_size=n)``) is replaced by a model of the same weights,
                which ``ShadowTrainer`` trains with FSDP2.
            config: the shadow's settings; by default the paper's.
            dtype: of the shadow's parameters. float32 beside a bfloat16 base is the usual choice.

        Raises:
            UnsupportedArchitectureError: if the base's architecture is not in the table.
            ConfigError: if the base is no transformers model, such as a ``PeftModel``; or the shadow's sizes do not
                fit, or its initialization does not fit or load.
        """
        config = config or ShadowConfig()
        check_unwrapped(base)
        architecture_of(base.config)
        base = as_parts(base)
        keep_differentiable(base)  # before the start of the shadow, which may run it
        shadow, initialization = start_shadow(base, config, dtype)
        model_config = ShadowModelConfig(
            shadow=config.to_dict(),
            base_config=base.config,
            backbone_config=shadow.backbone.config,
            base_name_or_path=absolute_name(base.config.name_or_path or ""),
            base_revision=commit_of(base.config),
            base_fingerprint=base_fingerprint(base),
            base_signature=base_signature(base),
            initialization=asdict(initialization),
            name_or_path=base.config.name_or_path or "",  # where trainers find a tokenizer and a reference model
        )
        return cls(model_config, base, shadow.to(device_of(base)))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        base: PreTrainedModel | str | None = None,
        check_base_weights: bool = True,
        mode: Mode = "attached",
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved shadow beside its base.

        Args:
            pretrained_model_name_or_path: a directory written by ``save_pretrained``, or a Hub id.
            base: the base itself, or its path or id; by default the one that ``config.json`` names.
            check_base_weights: whether a base of the right shape but with other weights is refused.
            mode: the initial mode, as for ``set_mode``.
            output_loading_info: whether to return the model and a dictionary of missing, unexpected and mismatched
                keys, as transformers does. They are all empty: such keys are an error here.
            **kwargs: hub keywords (``revision``, ``token``, ...) apply to the shadow; the rest (``dtype``,
                ``device_map``, ``attn_implementation``, ``quantization_config``, ...) loads the base.

        Raises:
            CheckpointError: if a file is missing or damaged, or the base is not the shadow's.
            ConfigError: if there is no such mode.
        """
        path = os.fspath(pretrained_model_name_or_path)
        model = load_model(cls, path, base, check_base_weights, **kwargs).set_mode(mode)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return (model, {kind: set() for kind in kinds}) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: str | int = "5GB",
        **kwargs: Any,
    ) -> None:
        """Write ``config.json``, ``model.safetensors`` (trained tensors only) and ``generation_config.json``.

        Keywords of ``PreTrainedModel.save_pretrained`` that concern other formats of files may be given and do nothing.

        Args:
            save_directory: made if it does not exist; an interrupted save leaves what was there.
            is_main_process: whether this process writes, in distributed training.
            state_dict: the model's gathered state, where a sharded trainer collected it.
            push_to_hub: whether to upload as well, to ``repo_id`` or the directory's name.
            max_shard_size: size above which tensors are split over several files.
            **kwargs: for the upload, as for ``push_to_hub``: ``repo_id``, ``private``, ``token``, ``revision``, ...

        Raises:
            CheckpointError: if the directory cannot be written.
            TypeError: if there is no such keyword, so that a misspelt ``private`` publishes nothing.
        """
        hub = check_save_keywords(self, kwargs)
        if not is_main_process:
            return
        directory = Path(save_directory)
        save_model(self, directory, state_dict, max_shard_size)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": directory.name, "max_shard_size": max_shard_size, **hub})

    def trained_modules(self) -> dict[str, nn.Module]:
        """Return the trained and saved modules by their paths in the model."""
        return {"shadow": self.shadow}

    def _parameters_read_in_forward(self) -> list[nn.Parameter]:
        """Return the parameters that a call reads itself, where others are read by the modules that they belong to."""
        head: Any = self.base.get_output_embeddings()
        return [*self.shadow.boundaries.parameters(), *(() if head is None else head.parameters())]

    @property
    def architecture(self) -> Architecture:
        """The base's entry in the table of architectures."""
        return architecture_of(self.base.config)

    def set_mode(self, mode: Mode) -> Self:
        """Set what calls compute: "attached", "detached" or "base". Returns the model."""
        if mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        self.mode = mode
        return self

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which calls run the base alone, in mode "base", such as the reference model of DPO."""
        mode = self.mode
        try:
            self.set_mode("base")
            yield
        finally:
            self.set_mode(mode)

    def reference(self) -> ReferenceModel:
        """Return the base alone as a model for ``ref_model=``, which shares the base and has no parameters."""
        return ReferenceModel(self)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ConfigError: the correction depends on the input, so no weights equal it. See ``detached``."""
        raise ConfigError(MERGE_ERROR)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable parameters and of all parameters."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Write the two numbers to standard output, in the words of PEFT."""
        trained, every = self.get_nb_trainable_parameters()
        share = 100 * trained / every
        sys.stdout.write(f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {share:.4f}\n")

    @takes_cache
    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        shadow_states: Tensor | None = None,
        run_shadow: bool = False,
        injection_from: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[BaseModelOutputWithPast, ShadowState]:
        """Run the shadow backbone and, when attached, the base's blocks beside it; other keywords go to both networks.

        Args:
            shadow_states: s0 (B, T, d), if ``run_backbone`` has already computed it for these tokens; when attached.
            run_shadow: whether the shadow backbone runs when attached even if the attached model does not need s0.
            injection_from: (B,) number of each sequence's leading tokens, padding not counted, that run as in the bare
                base. None takes those up to ``ShadowConfig.injection_after``, or none; a call that continues a cache
                then injects into every token. ``generate`` finds it once, in the prompt.

        Returns:
            The output of the base, or of the shadow backbone when detached. Its ``last_hidden_state`` (B, T, d) is the
            input of the head (s0 when detached), its cache that of both networks. And the state of the call, without
            an s0 where nothing needed it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("pass exactly one of input_ids and inputs_embeds")
        if self.config.output_hidden_states:
            kwargs.setdefault("output_hidden_states", True)
        if self.config.output_attentions:
            kwargs.setdefault("output_attentions", True)
        if use_cache is None:
            use_cache = bool(self.base.config.get_text_config(decoder=True).use_cache) and not self.training
        cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **kwargs,
        }
        if self.mode == "detached":
            output = self._run_backbone(inputs, cache, use_cache)
            return output, ShadowState(self.shadow.boundaries, output.last_hidden_state)
        inputs["injection_from"] = injection_from
        call = begin_call(self.base, self.shadow, inputs, cache, use_cache, shadow_states, run_shadow)
        return self.architecture.decoder_of(self.base)(**call), call["shadow"]

    def run_backbone(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, past_key_values: Cache
    ) -> Tensor:
        """Run the shadow backbone ahead of the base on (B, T) tokens and return s0 (B, T, d).

        The shadow's part of the cache then holds them. ``encode`` with ``shadow_states`` runs the base on them later.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        states = self._run_backbone(inputs, past_key_values, use_cache=True).last_hidden_state
        assert states is not None
        return states

    def _run_backbone(self, inputs: dict[str, Any], cache: Cache | None, use_cache: bool) -> BaseModelOutputWithPast:
        """Run the shadow backbone alone, on its part of the cache."""
        view = None
        if cache is not None:
            blocks = len(self.architecture.blocks_of(self.base))
            view = split_cache(cache, self.shadow.num_cache_layers, blocks)[0]
        if inputs.get("inputs_embeds") is None:
            inputs = {**inputs, "inputs_embeds": self.base.get_input_embeddings()(inputs["input_ids"])}
        output = self.shadow.run(**inputs, past_key_values=view, use_cache=use_cache)
        set_cache(output, cache)
        return output

    def _cache_of_base(self, cache: Cache | None) -> Cache | None:
        """Return the cache for a call in mode "base"; raises AttachError if another mode has filled it."""
        return cache_of_base(cache, self.shadow.num_cache_layers, len(self.architecture.blocks_of(self.base)))

    def needs_shadow(self, weights: LossWeights) -> bool:
        """Whether the losses of a call with labels need s0: the shadow's terms, or the draft head's."""
        return weights.shadow > 0 or weights.teach or (self.training and self.shadow.draft_head is not None)

    def freeze_unused(self) -> None:
        """Freeze parameters without a gradient in joint training: a backbone that neither boundaries nor losses use.

        Otherwise an optimizer keeps moments of them, and data parallelism waits for their gradients.
        """
        weights, config = self.loss_weights(), self.shadow.config
        if config.variant == "paper" or weights.shadow or weights.teach or config.shadow_loss_weight_end:
            return
        used = {"shadow.boundaries", "shadow.draft_head", "score"}
        parts = {f"shadow.{name}": module for name, module in self.shadow.named_children()}
        parts |= {name: module for name, module in self.trained_modules().items() if name != "shadow"}
        for name, module in parts.items():
            if name not in used:
                module.requires_grad_(False)

    def loss_weights(self, shadow_loss_weight: float | None = None) -> LossWeights:
        """Return the weights of the shadow's terms, lambda replaced if it is given."""
        config = self.shadow.config
        return LossWeights(
            config.shadow_loss_weight if shadow_loss_weight is None else shadow_loss_weight,
            config.distillation_weight,
            config.distillation_temperature,
            config.matching_weight,
            config.distillation_top_k,
        )

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's token embedding."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base's token embedding."""
        self.base.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the base's head."""
        self.base.set_output_embeddings(value)

    @property
    def vocab_size(self) -> int:
        """Size of the base's vocabulary."""
        return self.base.config.get_text_config(decoder=True).vocab_size

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set the attention implementation of both networks (``PreTrainedModel.set_attn_implementation``)."""
        self.base.set_attn_implementation(*args, **kwargs)
        self.shadow.backbone.set_attn_implementation(*args, **kwargs)
        self.config._attn_implementation = self.base.config._attn_implementation

    def get_decoder(self) -> nn.Module:
        """Return the base's headless model."""
        return self.architecture.decoder_of(self.base)

    def get_output_embeddings(self) -> nn.Module:
        """Return the base's head."""
        return self.base.get_output_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the base ties its own weights; the shadow has none to tie."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the base's vocabulary (``PreTrainedModel.resize_token_embeddings``) and keep the new rows frozen.

        A save holds the shadow alone: save the resized base as well and load with ``base=``.

        Raises:
            ConfigError: if the shadow's pretrained backbone has an embedding of its own.
        """
        if self.shadow.embedding is not None:
            raise ConfigError("this shadow's backbone has its own token embedding; resize the base before from_base()")
        embedding = self.base.resize_token_embeddings(*args, **kwargs)
        embedding.requires_grad_(False)
        if self.base.get_output_embeddings() is not None:
            self.base.get_output_embeddings().requires_grad_(False)
        record_resized_base(self.config, self.base)
        return embedding

    def enable_input_require_grads(self) -> None:
        """Do nothing: nothing below the first boundary is trained, and the shadow prepares its own input."""

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoint all blocks but those below the first boundary, which no gradient reaches."""
        super()._set_gradient_checkpointing(*args, **kwargs)
        blocks: Any = self.architecture.blocks_of(self.base)
        for block in blocks[: self.shadow.boundaries.first]:
            block.gradient_checkpointing = False

    def post_init(self) -> None:
        """Collect both networks' attributes for device placement, sharding and quantization; change no weight."""
        super().post_init()  # type: ignore[no-untyped-call]
        self._no_split_modules = set(self._no_split_modules or ()) | set(self.shadow.backbone._no_split_modules or ())
        backbone = self.shadow.backbone
        self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), *(backbone._keep_in_fp32_modules or ())}
        self._keep_in_fp32_modules_strict = {
            *(self._keep_in_fp32_modules_strict or ()),
            *(backbone._keep_in_fp32_modules_strict or ()),
        }
        self._keys_to_ignore_on_save = {f"base.{name}" for name in self.base.state_dict()}  # a save holds the shadow

    def init_weights(self) -> None:
        """Do nothing: base and shadow are initialized where they are built."""

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, likewise."""

    @property
    def trunk(self) -> nn.Module:
        """The model without its head, which trainers with their own head use as ``base_model``."""
        return HeadlessModel(self)


def loss_terms(joint: JointLoss | None) -> dict[str, Any]:
    """Return the terms of a joint loss by the field names of the models' outputs."""
    return {} if joint is None else {f"{name}_loss": term for name, term in joint._asdict().items() if name != "total"}


def check_marker(marker: tuple[int, ...] | None, vocabulary: int) -> None:
    """Raise ConfigError if ``injection_after`` has a token that no text can contain."""
    if marker is not None and max(marker) >= vocabulary:
        raise ConfigError(
            f"injection_after={list(marker)} has token {max(marker)}, but the base's vocabulary ends at "
            f"{vocabulary - 1}; take the ids that its tokenizer gives"
        )


def known_keywords(*modules: nn.Module) -> frozenset[str]:
    """Return the keywords that the ``forward`` of some of the modules names, and those of all transformers models."""
    names = {name for module in modules for name in inspect.signature(type(module).forward).parameters}
    return frozenset({*names, *TransformersKwargs.__annotations__, *CACHE_NAMES, *PASSED_ON} - {"self", "kwargs"})


def check_keywords(given: Iterable[str], known: frozenset[str], model: nn.Module) -> None:
    """Raise TypeError for the first unknown keyword, with the nearest known one.

    transformers' models ignore such a keyword, so a misspelt ``labels`` would train on nothing.
    """
    for name in given:
        if name not in known:
            raise TypeError(
                f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}{nearest(name, known)}"
            )
