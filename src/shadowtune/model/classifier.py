"""``ShadowForSequenceClassification``: a frozen base classifier and its shadow."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from shadowtune.compatibility import CACHE, cache_of, set_cache, takes_cache
from shadowtune.core.class_losses import classification_loss, joint_classification_loss
from shadowtune.core.losses import JointLoss
from shadowtune.errors import ConfigError
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.detached import detached_classifier
from shadowtune.model.keywords import check_keywords, check_labels
from shadowtune.model.pair import ShadowPair, loss_terms


@dataclass
class ShadowClassifierOutput(SequenceClassifierOutputWithPast):
    """The usual fields, and the terms of the joint loss, scalars without their weights; with labels.

    All but the shadow's come in mode "attached", where their weight is not 0.
    """

    base_loss: Tensor | None = None
    """Loss of the attached classifier."""
    shadow_loss: Tensor | None = None
    """Loss of the detached shadow."""
    distillation_loss: Tensor | None = None
    """Divergence of the attached classifier from the detached shadow."""
    matching_loss: Tensor | None = None
    """Relative squared distance of s0 from the last hidden state."""
    draft_loss: Tensor | None = None
    """Always None: classifiers draft no tokens."""


def last_token(attention_mask: Tensor | None, input_ids: Tensor | None, pad_token_id: int | None, length: int) -> Any:
    """Return for each row the position of its last real token, (B,): padding may stand on either side.

    Without a mask, tokens equal to ``pad_token_id`` count as padding; without both, the last position is taken.
    """
    if attention_mask is None:
        if input_ids is None or pad_token_id is None:
            return -1
        attention_mask = input_ids != pad_token_id
    positions = torch.arange(length, device=attention_mask.device)
    return (positions * attention_mask[:, -length:].int()).argmax(-1)


class ShadowForSequenceClassification(ShadowPair):
    """A sequence classifier made of a frozen base and a trainable shadow.

    ``model.score`` on the attached states and ``model.shadow_score`` on the shadow's, both of the last real token,
    start as copies of the base's own head and are trained, in the precision of the shadow. The base keeps its head.
    """

    auto_base = AutoModelForSequenceClassification

    def __init__(self, config: ShadowModelConfig, base: PreTrainedModel | None = None, shadow: Any = None) -> None:
        super().__init__(config, base, shadow)
        head = dict(self.base.named_children()).get("score")
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                f"{type(self.base).__name__} has no linear head 'score'; load the base with "
                "AutoModelForSequenceClassification"
            )
        if (top_k := self.shadow.config.distillation_top_k) is not None:
            raise ConfigError(
                f"distillation_top_k={top_k} is for language models; the distillation of a classifier looks at all "
                "classes: leave it out"
            )
        if self.shadow.config.head_mixing is not None:
            raise ConfigError(
                f"head_mixing={self.shadow.config.head_mixing:g} is for language models, whose one head serves both "
                "networks; a classifier has two: leave it out"
            )
        dtype = self.shadow.boundaries.injection_downs.dtype
        self.score = copy.deepcopy(head).to(dtype).requires_grad_(True)
        self.shadow_score = copy.deepcopy(self.score)
        self.num_labels = head.out_features

    def trained_modules(self) -> dict[str, nn.Module]:
        """Return what is trained and saved, by its path in the model."""
        return {**super().trained_modules(), "score": self.score, "shadow_score": self.shadow_score}

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
        num_items_in_batch: Tensor | int | None = None,
        shadow_loss_weight: float | None = None,
        **kwargs: Any,
    ) -> ShadowClassifierOutput | SequenceClassifierOutputWithPast:
        """Compute class logits (B, C), and with labels the joint loss.

        Args:
            input_ids: (B, T), padded on either side.
            labels: (B,) classes; (B,) or (B, C) numbers for regression; (B, C) zeros and ones for several classes.
            num_items_in_batch: labels in the whole optimizer step; all loss terms are divided by it.
            shadow_loss_weight: lambda of this call; None takes the config's.

        Raises:
            TypeError: for a keyword that nothing reads.
            ConfigError: if a trainer computes the loss by itself, from the logits, and the shadow's would be lost.
        """
        check_keywords(kwargs, self._known_keywords, self)
        weights = self.loss_weights(shadow_loss_weight)
        loses_terms = self.training and self.mode == "attached" and (weights.shadow != 0 or weights.teach)
        check_labels(labels, None, num_items_in_batch, loses_terms)
        if self.mode == "base" and self.base.config.pad_token_id is not None:
            return self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                **{CACHE: past_key_values},
                **kwargs,
            )
        texts = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        if self.mode == "base":
            return self._base_without_pad(texts, labels, num_items_in_batch, **kwargs)
        run_shadow = self.mode == "detached" or (labels is not None and self.needs_shadow(weights))
        output, state = self.encode(*texts, run_shadow=run_shadow, **kwargs)
        hidden_states = output.last_hidden_state
        assert hidden_states is not None
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        last = last_token(attention_mask, input_ids, self.config.pad_token_id, hidden_states.shape[1])
        # As transformers does, the head sees every position: of one row alone it rounds its products differently.
        dtype = self.score.weight.dtype
        head = self.score if self.mode == "attached" else self.shadow_score
        logits = head(hidden_states.to(dtype))[rows, last]
        joint = None
        if labels is not None and self.mode == "detached":
            loss = classification_loss(logits, labels, self.config.problem_type, num_items_in_batch)
            joint = JointLoss(loss, None, loss)
        elif labels is not None:
            s = state.initial
            joint = joint_classification_loss(
                logits,
                None if s is None else self.shadow_score(s.to(dtype))[rows, last],
                hidden_states[rows, last],
                None if s is None else s[rows, last],
                labels,
                weights,
                self.config.problem_type,
                num_items_in_batch,
            )
        result = ShadowClassifierOutput(
            loss=None if joint is None else joint.total,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **loss_terms(joint),
        )
        set_cache(result, cache_of(output))
        return result

    def _base_without_pad(
        self, texts: tuple[Any, ...], labels: Tensor | None, num_items_in_batch: Tensor | int | None, **kwargs: Any
    ) -> SequenceClassifierOutputWithPast:
        """What the bare base says, where its config names no pad token and its own forward refuses batches."""
        input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache = texts
        output = self.architecture.decoder_of(self.base)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: past_key_values},
            **kwargs,
        )
        states = output.last_hidden_state
        last = last_token(attention_mask, input_ids, self.config.pad_token_id, states.shape[1])
        logits = self.base.get_submodule("score")(states)[torch.arange(len(states), device=states.device), last]
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, num_items_in_batch)
        fields = {"hidden_states": output.hidden_states, "attentions": output.attentions, CACHE: cache_of(output)}
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, **fields)

    def detached(self) -> PreTrainedModel:
        """Return the detached shadow as a plain sequence classifier of the backbone's own architecture.

        Its pad token is this model's, ``config.pad_token_id``; without one it takes one text at a time.
        """
        return detached_classifier(self.base, self.shadow, self.shadow_score, self.config.pad_token_id)
