"""``ShadowForCausalLM``: a frozen base and its shadow as one transformers model."""

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from shadowtune.attach.architectures import Finish
from shadowtune.compatibility import CACHE, cache_of, pop_cache, set_cache, takes_cache
from shadowtune.config.speculation import SpeculationConfig
from shadowtune.core.drafting import draft_loss
from shadowtune.core.head import IGNORE_INDEX, Head
from shadowtune.core.losses import JointLoss, LossWeights, detached_causal_loss, joint_causal_loss
from shadowtune.core.prepacked_linear import is_plain_linear
from shadowtune.core.top_tokens import TopTokens
from shadowtune.errors import ConfigError
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.detached import detached_causal_lm
from shadowtune.model.fused_head import carry_shadow_loss
from shadowtune.model.keywords import check_keywords, check_labels
from shadowtune.model.pair import ShadowPair, loss_terms
from shadowtune.model.speculation.decoding import Speculator


@dataclass
class ShadowCausalLMOutput(CausalLMOutputWithPast):
    """What a forward call returns: the usual fields, and the terms of the joint loss, scalars without their weights.

    They come with labels, in mode "attached", where their weight is not 0.
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
    """CE of what the draft fusion proposes."""
    last_hidden_state: Tensor | None = None
    """h (B, T, d) in front of the head, without labels, where the shadow has a draft fusion that reads it."""


class ShadowForCausalLM(ShadowPair, GenerationMixin):
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
                "out to look at all of them"
            )
        self.generation_config = copy.deepcopy(self.base.generation_config)
        carry_shadow_loss(self)

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
        **kwargs: Any,
    ) -> ShadowCausalLMOutput | CausalLMOutputWithPast:
        """Compute logits, and with labels the joint loss (Eq. 8-9).

        Args:
            input_ids: (B, T) token ids, or give ``inputs_embeds`` (B, T, d).
            labels: (B, T), -100 where there is nothing to learn; shifted inside.
            logits_to_keep: how many last positions get logits, all if 0; or the positions themselves.
            num_items_in_batch: labelled tokens in the whole optimizer step; all loss terms are divided by it.
            shadow_loss_weight: lambda of this call; None takes the config's.
            teacher_tokens: (B, T, k), the base's most likely next tokens where they are known already. In training in
                mode "detached", and unless ``matching_weight`` needs more of the base, they spare its forward pass.
            teacher_log_probabilities: (B, T, k), of those tokens, as ``core/top_tokens.py`` describes them.
            shadow_states: s0 (B, T, d) where ``run_backbone`` has made it already; in mode "attached".
            run_shadow: whether the shadow's backbone runs in mode "attached" even where nothing in this call needs it,
                so that its part of the cache holds these tokens.
            **kwargs: further keywords of the base's decoder. Also ``shift_labels`` (B, T), labels that are shifted
                already: that of position t is the token after it. They take the place of ``labels``, which must be
                given too, as transformers' Trainer does under context parallelism, where the next token of the last
                position belongs to another process.

        Returns:
            Logits (B, T, V); None in training with labels, where only labelled positions reach the head.

        Raises:
            TypeError: for a keyword that nothing reads.
            ConfigError: if a trainer computes the loss by itself, from the logits, and the shadow's would be lost.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # by name, Trainer would look for it in every batch
        check_keywords(kwargs, self._known_keywords, self)
        check_labels(labels, shift_labels, num_items_in_batch, loses_terms=self.training)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs = {**text, "position_ids": position_ids, **kwargs}
        if self.mode == "base":
            if num_items_in_batch is not None:
                inputs["num_items_in_batch"] = num_items_in_batch
            if shift_labels is not None:
                inputs["shift_labels"] = shift_labels
            cache = {CACHE: past_key_values, "use_cache": use_cache}
            return self.base(**inputs, **cache, labels=labels, logits_to_keep=logits_to_keep)
        use_cache = use_cache if labels is None else False
        weights = self.loss_weights(shadow_loss_weight)
        run_shadow = run_shadow or (labels is not None and self.needs_shadow(weights))
        output, state = self.encode(
            **inputs,
            past_key_values=past_key_values,
            use_cache=use_cache,
            shadow_states=shadow_states,
            run_shadow=run_shadow,
        )
        hidden_states = output.last_hidden_state
        assert hidden_states is not None
        joint = None
        if labels is not None:
            teacher = None
            if self.mode == "detached":
                teacher = self._teacher(weights, (teacher_tokens, teacher_log_probabilities), inputs)
            h, s = hidden_states, state.initial
            if shift_labels is not None:
                labels, h, s, teacher = _as_unshifted(shift_labels, h, s, teacher)
            if self.mode == "attached":
                joint = self._attached_loss(h, s, labels, weights, num_items_in_batch)
            else:
                weights = LossWeights(1.0) if teacher is None else weights
                assert s is not None
                joint = detached_causal_loss(self.head, s, labels, weights, num_items_in_batch, teacher)
        logits = None
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.logits_of(hidden_states[:, kept])
        result = ShadowCausalLMOutput(
            loss=None if joint is None else joint.total,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            last_hidden_state=hidden_states if labels is None and self.shadow.draft_fusion is not None else None,
            **loss_terms(joint),
        )
        set_cache(result, cache_of(output))
        return result

    def _attached_loss(
        self,
        hidden_states: Tensor,
        initial_states: Tensor | None,
        labels: Tensor,
        weights: LossWeights,
        num_items_in_batch: Tensor | int | None,
    ) -> JointLoss:
        """The joint loss, and in training that of the draft fusion; only the attached model's where s0 is not there."""
        joint = joint_causal_loss(self.head, hidden_states, initial_states, labels, weights, num_items_in_batch)
        fusion = self.shadow.draft_fusion
        if fusion is None or not self.training:
            return joint
        assert initial_states is not None
        seen = self.shadow.boundaries.mixed(hidden_states, initial_states)  # as when it drafts
        draft = draft_loss(self.head, fusion, seen, initial_states, labels, num_items_in_batch)
        return joint._replace(total=joint.total + draft, draft=draft)

    def _teacher(
        self, weights: LossWeights, known: tuple[Tensor | None, Tensor | None], inputs: dict[str, Any]
    ) -> Tensor | TopTokens | None:
        """What the detached shadow learns from beside the text: nothing in evaluation."""
        if not (self.training and weights.teach):
            return None
        tokens, log_probabilities = known
        if tokens is None or log_probabilities is None or weights.matching:
            return self.base_states(**inputs)
        return TopTokens(tokens, log_probabilities)

    @torch.no_grad()
    def base_states(self, **inputs: Any) -> Tensor:
        """Return the last hidden states (B, T, d) of the bare base, without gradients; ``inputs`` as in ``forward``."""
        return self.architecture.decoder_of(self.base)(**inputs, use_cache=False).last_hidden_state

    def logits_of(self, hidden_states: Tensor) -> Tensor:
        """Apply the base's head and whatever the architecture does after it: (..., d) -> (..., V)."""
        logits = self.base.get_output_embeddings()(hidden_states.to(self.base.dtype))
        return logits if self._finish is None else self._finish(logits)

    @property
    def head(self) -> Head:
        """The base's head as the losses want it; its weight is known if it is an ordinary one and frozen."""
        module = self.base.get_output_embeddings()
        if not is_plain_linear(module) or module.weight.requires_grad:
            return Head(self.logits_of)
        return Head(self.logits_of, module.weight, module.bias, self._finish)

    @property
    def _finish(self) -> Finish | None:
        return self.architecture.finish(self.base.config.get_text_config(decoder=True))

    @torch.no_grad()
    def generate(self, *args: Any, speculate: bool | int | str | SpeculationConfig = False, **kwargs: Any) -> Any:
        """Generate with everything transformers offers, in the current mode (GenerationMixin.generate).

        Args:
            speculate: whether the shadow drafts and the attached model verifies: True or "auto", a number of tokens to
                draft at a time, or settings. What greedy decoding says stays the same, and samples fall with the same
                probabilities. Where it is not possible (beams, a cache that cannot take tokens back) a warning says so.

        Raises:
            ConfigError: if ``speculate`` is none of these, or does not go with the mode or other arguments.
        """
        speculation = SpeculationConfig.of(speculate)
        if speculation is not None:
            faults = [name for name in ("assistant_model", "custom_generate") if kwargs.get(name) is not None]
            if self.mode != "attached" or faults:
                against = f"mode {self.mode!r}" if self.mode != "attached" else faults[0]
                raise ConfigError(f"speculate={speculate!r} does not go with {against}; leave one of them out")
            kwargs["custom_generate"] = Speculator(speculation, kwargs.get("streamer"), kwargs.get("synced_gpus"))
        if self.mode == "base":
            if len(args) < 2:
                kwargs = self._base_settings(**kwargs)
            return cast(GenerationMixin, self.base).generate(*args, **kwargs)
        return super().generate(*args, **kwargs)

    def _base_settings(self, generation_config: GenerationConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Keywords with which the base's own ``generate`` does what this model's generation config says.

        They are put into one config, because transformers deprecates a config beside further settings; those that are
        None stay beside it, for in a config None means the base's own value.
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
        """The tokens (K,) that the shadow drafts from, saved with it; None if from all."""
        return self.shadow.draft_vocabulary

    def set_draft_vocabulary(self, tokens: Tensor) -> None:
        """Let the shadow draft from these tokens (K,) alone, in speculative decoding; they are saved with it.

        Raises:
            ConfigError: if there are none, or one is not in the base's vocabulary.
        """
        vocabulary = self.base.config.get_text_config(decoder=True).vocab_size
        if len(tokens) == 0 or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            raise ConfigError(f"a draft vocabulary is a list of token ids from 0 to {vocabulary - 1}, got {tokens}")
        self.shadow.draft_vocabulary = tokens.to(self.base.device)
        self.config.draft_vocabulary_size = len(tokens)

    def set_head_mixing(self, gamma: float | None) -> None:
        """Give the shadow's own logits this weight in the attached model's: ``ShadowConfig.head_mixing``, saved."""
        shadow = self.shadow
        shadow.config = shadow.boundaries.config = replace(shadow.config, head_mixing=gamma)
        self.config.shadow["head_mixing"] = gamma

    def detached(self) -> PreTrainedModel:
        """Return the detached shadow as an ordinary transformers model of the backbone's own architecture.

        Its logits equal those of detached mode: the projection is folded into its head, the projection of the base's
        embeddings into its embedding; its generation config is a copy of this model's. The result shares no memory with
        this model.
        """
        return detached_causal_lm(self.base, self.shadow, self.generation_config)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Leave the (B, T) mask two-dimensional: the two networks may attend differently and make their own from it.

        It is padded to the length of the cache, so that a compiled step sees one shape, not a longer one each time.
        """
        cache = pop_cache(kwargs)
        if attention_mask is None or cache is None:
            return attention_mask
        return F.pad(attention_mask, (0, max(0, cache.get_max_length() - attention_mask.shape[1])))

    def _get_static_cache_init_shape(self) -> None:
        """The two networks' key shapes and dtypes may differ, so a static cache is filled in on first use."""


def _as_unshifted(
    shift_labels: Tensor, h: Tensor, s: Tensor | None, teacher: Tensor | TopTokens | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | TopTokens | None]:
    """Move shifted labels (B, T) behind the tokens that they belong to, (B, T + 1), and lengthen the rest alike."""
    labels = F.pad(shift_labels, (1, 0), value=IGNORE_INDEX)
    h, s = F.pad(h, (0, 0, 0, 1)), None if s is None else F.pad(s, (0, 0, 0, 1))
    if isinstance(teacher, TopTokens):
        return labels, h, s, TopTokens(*(F.pad(known, (0, 0, 0, 1)) for known in teacher))
    return labels, h, s, None if teacher is None else F.pad(teacher, (0, 0, 0, 1))
