"""``ShadowForCausalLM``: a frozen causal language model and its shadow as one transformers model."""

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from shadowtune.attach.sharding import device_of, gathered_linear, has_whole_weight
from shadowtune.compatibility import CACHE, cache_of, pop_cache, set_cache, takes_cache
from shadowtune.config.shadow import SpeculationConfig
from shadowtune.core.boundary import ShadowState
from shadowtune.core.draft_head import DraftVocabulary, draft_features, draft_loss
from shadowtune.core.kernels.linear_cross_entropy import Head, LogitsTransform
from shadowtune.core.losses import (
    IGNORE_INDEX,
    JointLoss,
    LossWeights,
    TopTokens,
    detached_causal_loss,
    joint_causal_loss,
)
from shadowtune.core.shared_prompt import shared_prompt_lengths
from shadowtune.errors import ConfigError
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.detached import detached_causal_lm
from shadowtune.model.modeling import ShadowPreTrainedModel, check_keywords, loss_terms
from shadowtune.model.speculation.decoding import Speculator
from shadowtune.model.trainer_losses import add_shadow_loss_hooks, check_labels, check_schedule, guard_output


@dataclass
class ShadowCausalLMOutput(CausalLMOutputWithPast):
    """Output of a forward call: the usual fields, and the terms of the joint loss, scalars without their weights.

    The terms are set with labels, in mode "attached", if their weight is not 0.
    """

    base_loss: Tensor | None = None
    """CE of the attached model."""
    shadow_loss: Tensor | None = None
    """CE of the detached shadow; in mode "detached" too."""
    distillation_loss: Tensor | None = None
    """Divergence of the attached model from the detached shadow."""
    matching_loss: Tensor | None = None
    """Relative squared distance of s0 from the last hidden state."""
    draft_loss: Tensor | None = None
    """CE of the draft head's proposals."""
    last_hidden_state: Tensor | None = None
    """h (B, T, d), the input of the head; without labels, if the shadow has a draft head."""
    draft_features: Tensor | None = None
    """(B, T, (1 + m) d), what a draft head reads of the attached model: h and the inputs of ``draft_layers``."""


class ShadowForCausalLM(ShadowPreTrainedModel, GenerationMixin):
    """A causal language model made of a frozen base and a trainable shadow.

    ``model.base`` is the model that was passed in, ``model.shadow`` the trainable module. ``set_mode`` chooses what a
    call computes: "attached" (both), "detached" (the shadow alone, with the base's head) or "base".
    """

    auto_base = AutoModelForCausalLM

    def __init__(self, config: ShadowModelConfig, base: PreTrainedModel | None = None, shadow: Any = None) -> None:
        super().__init__(config, base, shadow)
        if self.base.get_output_embeddings() is None:
            raise ConfigError(
                f"{type(self.base).__name__} has no language model head; load the base with AutoModelForCausalLM"
            )
        top_k = self.shadow.config.distillation_top_k
        vocabulary = self.base.config.get_text_config(decoder=True).vocab_size
        if top_k is not None and top_k > vocabulary:
            raise ConfigError(
                f"distillation_top_k={top_k} is more than the {vocabulary} tokens of the base's vocabulary; leave it "
                "out to use all of them"
            )
        self.generation_config = copy.deepcopy(self.base.generation_config)
        add_shadow_loss_hooks(self)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        shadow_loss_weight: float | None = None,
        teacher_tokens: Tensor | None = None,
        teacher_log_probabilities: Tensor | None = None,
        shadow_states: Tensor | None = None,
        run_shadow: bool = False,
        injection_from: Tensor | None = None,
        **kwargs: Any,
    ) -> ShadowCausalLMOutput | CausalLMOutputWithPast:
        """Compute logits, and with labels the joint loss (Eq. 8-9).

        Args:
            input_ids: (B, T) token ids, or give ``inputs_embeds`` (B, T, d).
            labels: (B, T), -100 where there is no loss; shifted inside. ``shift_labels`` (B, T) beside them replace
                them and are not shifted (context parallelism of transformers' Trainer).
            logits_to_keep: number of last positions that get logits, all if 0; or the positions themselves.
            num_items_in_batch: labelled tokens in the whole optimizer step; all loss terms are divided by it.
            shadow_loss_weight: lambda of this call; None takes the config's.
            teacher_tokens, teacher_log_probabilities: (B, T, k), the base's ``core.losses.TopTokens`` if known. In
                training in mode "detached" they replace its forward pass, unless ``matching_weight`` needs its states.
            shadow_states, run_shadow, injection_from: as in ``encode``.
            **kwargs: further keywords of the base's decoder.

        Returns:
            Logits (B, T, V); None in training with labels, where only labelled positions reach the head.

        Raises:
            TypeError: for an unknown keyword.
            ConfigError: if a trainer computes the loss itself, from the logits, without the shadow's terms.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # by name, Trainer would look for it in every batch
        check_keywords(kwargs, self._known_keywords, self)
        check_labels(labels, shift_labels, num_items_in_batch, loses_terms=self.training)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs = {**text, "position_ids": position_ids, **kwargs}
        if self.mode == "base":
            loss = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return self._base_output(inputs, past_key_values, use_cache, logits_to_keep, loss)
        if self.training and self.mode == "attached":
            check_schedule(self.shadow.config, shadow_loss_weight, num_items_in_batch)
        weights = self.loss_weights(shadow_loss_weight)
        output, state = self.encode(
            **inputs,
            past_key_values=past_key_values,
            use_cache=use_cache if labels is None else False,
            shadow_states=shadow_states,
            injection_from=injection_from,
            run_shadow=run_shadow or (labels is not None and self.needs_shadow(weights)),
        )
        hidden_states = cast(Tensor, output.last_hidden_state)
        logits = joint = None
        if labels is not None:
            teacher = self._teacher(weights, teacher_tokens, teacher_log_probabilities, inputs)
            with gathered_linear(self.base.get_output_embeddings(), hidden_states):
                joint = self._loss(hidden_states, state, teacher, labels, shift_labels, weights, num_items_in_batch)
        if labels is None or not self.training:
            logits = self._logits_at(logits_to_keep, hidden_states, inputs)
            if self.training and self.mode == "attached":
                guard_output(logits, weights)
        return self._output(output, logits, joint, state)

    def _base_output(
        self,
        inputs: dict[str, Any],
        past_key_values: Cache | None,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
        loss: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        """Output of the base alone; arguments of the loss that are None are left out, for not every base has them."""
        given = {name: value for name, value in loss.items() if value is not None}
        cache = {CACHE: self._cache_of_base(past_key_values), "use_cache": use_cache}
        return self.base(**inputs, **cache, logits_to_keep=logits_to_keep, **given)

    def _logits_at(self, positions: int | Tensor, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Logits of positions as in ``logits_to_keep``, on the device of the inputs if there are several devices."""
        kept = slice(-positions, None) if isinstance(positions, int) else positions
        logits = self.logits_of(hidden_states[:, kept])
        source = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
        return logits.to(source.device)

    def _loss(
        self,
        h: Tensor,
        state: ShadowState,
        teacher: Tensor | TopTokens | None,
        labels: Tensor,
        shift_labels: Tensor | None,
        weights: LossWeights,
        num_items_in_batch: Tensor | int | None,
    ) -> JointLoss:
        """Loss of the current mode; when attached and training, that of the draft head is added."""
        s, layers = state.initial, [state.recorded[block] for block in self.shadow.draft_layers if state.recorded]
        if shift_labels is not None:
            labels, h, s, teacher = _as_unshifted(shift_labels, h, s, teacher)
            layers = [F.pad(states, (0, 0, 0, 1)) for states in layers]
        weight = self.head.weight
        device = h.device if weight is None else weight.device  # that of the last block or of the head (device_map)
        h, labels, s = h.to(device), labels.to(device), None if s is None else s.to(device)
        layers = [states.to(device) for states in layers]
        if self.mode == "detached":
            assert s is not None
            weights = LossWeights(1.0) if teacher is None else weights
            return detached_causal_loss(self.head, s, labels, weights, num_items_in_batch, teacher)
        joint = joint_causal_loss(self.head, h, s, labels, weights, num_items_in_batch)
        draft_head = self.shadow.draft_head
        if draft_head is None or not self.training:
            return joint
        assert s is not None
        features = draft_features(self.shadow.boundaries.interpolated(h, s), layers)  # as in drafting
        steps = self.shadow.config.draft_steps
        vocabulary = DraftVocabulary(self.head, self.draft_vocabulary)
        count = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        draft = draft_loss(vocabulary.head, draft_head, features, s, vocabulary.labels(labels), steps, count)
        return joint._replace(total=joint.total + draft, draft=draft)

    def _teacher(
        self, weights: LossWeights, tokens: Tensor | None, log_probabilities: Tensor | None, inputs: dict[str, Any]
    ) -> Tensor | TopTokens | None:
        """Targets of shadow-only training beside the text: the base's states or most likely tokens."""
        if self.mode != "detached" or not self.training or not weights.teach:
            return None
        if tokens is None or log_probabilities is None or weights.matching:
            return self.base_states(**inputs)
        return TopTokens(tokens, log_probabilities)

    def _output(
        self, output: BaseModelOutputWithPast, logits: Tensor | None, joint: JointLoss | None, state: ShadowState
    ) -> ShadowCausalLMOutput:
        drafts = joint is None and self.shadow.draft_head is not None
        result = ShadowCausalLMOutput(
            loss=None if joint is None else joint.total,
            logits=cast(torch.FloatTensor, logits),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            last_hidden_state=output.last_hidden_state if drafts else None,
            draft_features=self._draft_features(output, state) if drafts else None,
            **loss_terms(joint),
        )
        set_cache(result, cache_of(output))
        return result

    def _draft_features(self, output: BaseModelOutputWithPast, state: ShadowState) -> Tensor:
        h = cast(Tensor, output.last_hidden_state)
        return draft_features(h, [state.recorded[block] for block in self.shadow.draft_layers if state.recorded])

    @torch.no_grad()
    def base_states(self, **inputs: Any) -> Tensor:
        """Return the last hidden states (B, T, d) of the bare base, without gradients; ``inputs`` as in ``forward``."""
        return self.architecture.decoder_of(self.base)(**inputs, use_cache=False).last_hidden_state

    def logits_of(self, hidden_states: Tensor) -> Tensor:
        """Apply the base's head and the architecture's logits transform: (..., d) -> (..., V)."""
        logits = self.base.get_output_embeddings()(hidden_states.to(self.base.dtype)).to(hidden_states.device)
        return self.transform_logits(logits)

    def transform_logits(self, logits: Tensor) -> Tensor:
        """Apply the architecture's transform (scale, soft-capping), if it has one, to the head's products (..., V)."""
        return logits if self._logits_transform is None else self._logits_transform(logits)

    @property
    def head(self) -> Head:
        """The base's head for the losses; its weight is known if it is an ordinary linear layer and frozen."""
        module = self.base.get_output_embeddings()
        if not has_whole_weight(module) or module.weight.requires_grad:  # quantized, sharded or trained
            return Head(self.logits_of)
        if module.weight.is_meta and device_of(self).type != "meta":  # offloaded; a plan has no weights at all
            return Head(self.logits_of)
        return Head(self.logits_of, module.weight, module.bias, self._logits_transform)

    @property
    def _logits_transform(self) -> LogitsTransform | None:
        return self.architecture.logits_transform(self.base.config.get_text_config(decoder=True))

    @torch.no_grad()
    def generate(self, *args: Any, speculate: bool | int | str | SpeculationConfig = False, **kwargs: Any) -> Any:
        """Generate with everything transformers offers, in the current mode (GenerationMixin.generate).

        Args:
            speculate: whether the shadow drafts and the attached model verifies: True or "auto", a number of tokens to
                draft at a time, or settings. Greedy decoding gives the same tokens, sampling the same distribution.
                Where it is not possible (beams, a cache that cannot be cropped), a warning is given. A trainer that
                generates takes it from its generation settings (``generation_kwargs={"speculate": True}`` in GRPO).

        Raises:
            ConfigError: if ``speculate`` is none of these, or does not go with the mode or other arguments.
        """
        given = kwargs.get("generation_config")
        if speculate is False and given is not None and self.mode == "attached":
            speculate = vars(given).get("speculate", False)
        speculation = SpeculationConfig.of(speculate)
        if speculation is not None:
            conflicts = [name for name in ("assistant_model", "custom_generate") if kwargs.get(name) is not None]
            if self.mode != "attached" or conflicts:
                against = f"mode {self.mode!r}" if self.mode != "attached" else conflicts[0]
                raise ConfigError(f"speculate={speculate!r} does not go with {against}; leave one of them out")
            kwargs["custom_generate"] = Speculator(speculation, kwargs.get("streamer"), kwargs.get("synced_gpus"))
        if self.mode == "base":
            if len(args) < 2:
                kwargs = self._base_settings(**kwargs)
            cache = self._cache_of_base(pop_cache(kwargs))
            kwargs |= {} if cache is None else {CACHE: cache}
            return cast(GenerationMixin, self.base).generate(*args, **kwargs)
        return super().generate(*args, **kwargs)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:
        """Find the shared prompt of each sequence once, in the whole prompt, for all steps (``injection_from``)."""
        marker, mask = self.shadow.config.injection_after, model_kwargs.get("attention_mask")
        given, embeds = model_kwargs.get("injection_from"), model_kwargs.get("inputs_embeds")
        whole = mask is None or mask.shape == input_ids.shape
        if given is not None:
            tokens = input_ids.shape[1] if embeds is None else embeds.shape[1]
            if int(given.max()) > (tokens if mask is None else mask.shape[1]):
                raise ConfigError(
                    f"injection_from={given.tolist()} is beyond the prompt of {tokens} tokens; generated tokens always "
                    "get injections"
                )
        elif marker is not None and embeds is None and whole and self.mode == "attached":
            model_kwargs["injection_from"] = shared_prompt_lengths(input_ids, marker, mask)
        return cast(Any, super())._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _base_settings(self, generation_config: GenerationConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Keywords with which the base's own ``generate`` follows this model's generation config.

        They are merged into one config, because transformers deprecates a config beside further settings; those that
        are None stay beside it, because in a config None means the base's own value.
        """
        own = self.generation_config.to_dict()
        if generation_config is None and own == self.base.generation_config.to_dict():
            return kwargs
        settings = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        settings.update(**own, defaults_only=True, allow_custom_entries=True)
        unset = {name: value for name, value in kwargs.items() if value is None}
        rest = settings.update(**{name: value for name, value in kwargs.items() if value is not None})
        return {"generation_config": settings, **rest, **unset}

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Batch continuously (``generate_batch``) with the base alone, in mode "base".

        Raises:
            ConfigError: in the other modes: transformers' paged cache has no room for a second network.
        """
        if self.mode == "base":
            return cast(Any, self.base).init_continuous_batching(*args, **kwargs)
        raise ConfigError(
            f"generate_batch (continuous batching) does not go with mode {self.mode!r}: its paged cache holds one "
            "network; serve requests with `shadowtune serve cloud`, generate from a padded batch, or take "
            "model.detached(), a plain model"
        )

    @property
    def draft_vocabulary(self) -> Tensor | None:
        """The tokens (K,) that the shadow's drafts are restricted to, saved with it; None without a restriction."""
        return self.shadow.draft_vocabulary

    def set_draft_vocabulary(self, tokens: Tensor) -> None:
        """Restrict the shadow's drafts in speculative decoding to these tokens (K,); they are saved with it.

        Raises:
            ConfigError: if there are none, or one is not in the base's vocabulary.
        """
        vocabulary = self.base.config.get_text_config(decoder=True).vocab_size
        if len(tokens) == 0 or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            raise ConfigError(f"a draft vocabulary is a list of token ids from 0 to {vocabulary - 1}, got {tokens}")
        self.shadow.draft_vocabulary = tokens.to(device_of(self.base))
        self.config.draft_vocabulary_size = len(tokens)

    def set_logit_interpolation(self, gamma: float | None) -> None:
        """Set and save ``ShadowConfig.logit_interpolation``: gamma, the weight of the shadow's logits when attached."""
        shadow = self.shadow
        shadow.config = shadow.boundaries.config = replace(shadow.config, logit_interpolation=gamma)
        self.config.shadow["logit_interpolation"] = gamma

    def detached(self) -> PreTrainedModel:
        """Return the detached shadow as an ordinary transformers model of the backbone's own architecture.

        Its logits equal those of detached mode: the projection is folded into its head, the projection of the base's
        embeddings into its embedding; its generation config is a copy of this model's. The result shares no memory with
        this model.
        """
        return detached_causal_lm(self.base, self.shadow, self.generation_config)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Return the (B, T) mask two-dimensional, because the two networks may need different attention masks.

        It is padded to the length of the cache, so that a compiled decoding step always gets the same shape.
        """
        cache = pop_cache(kwargs)
        if attention_mask is None or cache is None:
            return attention_mask
        return F.pad(attention_mask, (0, max(0, cache.get_max_length() - attention_mask.shape[1])))

    def _get_static_cache_init_shape(self) -> None:
        """Return None: the networks' key shapes and dtypes may differ, so a static cache is allocated on first use."""


def _as_unshifted(
    shift_labels: Tensor, h: Tensor, s: Tensor | None, teacher: Tensor | TopTokens | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | TopTokens | None]:
    """Move shifted labels (B, T) by one to unshifted labels (B, T + 1), and pad the rest to that length."""
    labels = F.pad(shift_labels, (1, 0), value=IGNORE_INDEX)
    h, s = F.pad(h, (0, 0, 0, 1)), None if s is None else F.pad(s, (0, 0, 0, 1))
    if isinstance(teacher, TopTokens):
        return labels, h, s, TopTokens(*(F.pad(known, (0, 0, 0, 1)) for known in teacher))
    return labels, h, s, None if teacher is None else F.pad(teacher, (0, 0, 0, 1))
