"""``ShadowForSequenceClassification``: a frozen base classifier and its shadow."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from shadowtune.compatibility import CACHE, cache_of, set_cache, takes_cache
from shadowtune.core.losses import JointLoss, LossWeights, classification_loss, joint_classification_loss
from shadowtune.errors import ConfigError
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.detached import detached_classifier
from shadowtune.model.modeling import ShadowPreTrainedModel, check_keywords, loss_terms
from shadowtune.model.trainer_losses import check_labels, check_schedule, guard_output


@dataclass
class ShadowClassifierOutput(SequenceClassifierOutputWithPast):
    """Output of a forward call: the usual fields, and the terms of the joint loss, scalars without their weights.

    The terms are set with labels, all but the shadow's only in mode "attached", if their weight is not 0.
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
    """Always None: classifiers have no draft head."""


def last_token(attention_mask: Tensor | None, input_ids: Tensor | None, pad_token_id: int | None, length: int) -> Any:
    """Return the position of each sequence's last real token, (B,); padding may be on either side.

    Without a mask, tokens equal to ``pad_token_id`` count as padding; without both, the result is -1.
    """
    if attention_mask is None:
        if input_ids is None or pad_token_id is None:
            return -1
        attention_mask = input_ids != pad_token_id
    positions = torch.arange(length, device=attention_mask.device)
    return (positions * attention_mask[:, -length:].int()).argmax(-1)


class ShadowForSequenceClassification(ShadowPreTrainedModel):
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
                f"distillation_top_k={top_k} is for language models; the distillation of a classifier uses all "
                "classes: leave it out"
            )
        if (gamma := self.shadow.config.logit_interpolation) is not None:
            raise ConfigError(
                f"logit_interpolation={gamma:g} is for language models, where one head serves both networks; a "
                "classifier has two: leave it out"
            )
        dtype = self.shadow.boundaries.injection_downs.dtype
        self.score = copy.deepcopy(head).to(dtype).requires_grad_(True)
        self.shadow_score = copy.deepcopy(self.score)
        self.num_labels = head.out_features

    def trained_modules(self) -> dict[str, nn.Module]:
        """Return the trained and saved modules by their paths in the model."""
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
        example_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> ShadowClassifierOutput | SequenceClassifierOutputWithPast:
        """Compute class logits (B, C), and with labels the joint loss.

        Args:
            input_ids: (B, T), padded on either side.
            labels: (B,) classes; (B,) or (B, C) numbers for regression; (B, C) zeros and ones for several classes.
            num_items_in_batch: labels in the whole optimizer step; all loss terms are divided by it.
            shadow_loss_weight: lambda of this call; None takes the config's.
            example_weights: (B,) factors of the examples' losses, for one class per example.

        Raises:
            TypeError: for an unknown keyword.
            ConfigError: if a trainer computes the loss itself, from the logits, without the shadow's terms.
        """
        check_keywords(kwargs, self._known_keywords, self)
        if self.training and self.mode == "attached":
            check_schedule(self.shadow.config, shadow_loss_weight, num_items_in_batch)
        weights = self.loss_weights(shadow_loss_weight)
        loses_terms = self.training and self.mode == "attached" and (weights.shadow != 0 or weights.teach)
        check_labels(labels, None, num_items_in_batch, loses_terms)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs = {**text, "position_ids": position_ids, "use_cache": use_cache, **kwargs}
        if self.mode == "base":
            inputs[CACHE] = self._cache_of_base(past_key_values)
            if self.base.config.pad_token_id is not None:
                return self.base(**inputs, labels=labels)
            return self._base_without_pad(inputs, labels, num_items_in_batch)
        run_shadow = self.mode == "detached" or (labels is not None and self.needs_shadow(weights))
        output, state = self.encode(**inputs, past_key_values=past_key_values, run_shadow=run_shadow)
        states = cast(Tensor, output.last_hidden_state)
        last = self._last_tokens(inputs, states)
        # As in transformers, the head is applied to every position: on one position alone, products round differently.
        head = self.score if self.mode == "attached" else self.shadow_score
        logits = head(states.to(self.score.weight.dtype))[last]
        joint = None
        if labels is None and self.training and self.mode == "attached":
            guard_output(logits, weights)
        if labels is not None:
            targets = (labels, num_items_in_batch, example_weights)
            joint = self._loss(logits, states, state.initial, last, weights, targets)
        result = ShadowClassifierOutput(
            loss=None if joint is None else joint.total,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **loss_terms(joint),
        )
        set_cache(result, cache_of(output))
        return result

    def _loss(
        self,
        logits: Tensor,
        states: Tensor,
        initial_states: Tensor | None,
        last: tuple[Tensor, Any],
        weights: LossWeights,
        targets: tuple[Tensor, Tensor | int | None, Tensor | None],
    ) -> JointLoss:
        """Loss of the current mode, "attached" or "detached"; the targets are labels, their count and their weights."""
        problem_type, (labels, num_items_in_batch, example_weights) = self.config.problem_type, targets
        if self.mode == "detached":
            loss = classification_loss(logits, labels, problem_type, num_items_in_batch, example_weights)
            return JointLoss(loss, None, loss)
        s = initial_states
        return joint_classification_loss(
            logits,
            None if s is None else self.shadow_score(s.to(self.score.weight.dtype))[last],
            states[last],
            None if s is None else s[last],
            labels,
            weights,
            problem_type,
            num_items_in_batch,
            example_weights,
        )

    def _base_without_pad(
        self, inputs: dict[str, Any], labels: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> SequenceClassifierOutputWithPast:
        """Output of the bare base without a pad token in its config, whose own forward refuses batches."""
        output = self.architecture.decoder_of(self.base)(**inputs)
        states = output.last_hidden_state
        logits = self.base.get_submodule("score")(states)[self._last_tokens(inputs, states)]
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, num_items_in_batch)
        fields = {"hidden_states": output.hidden_states, "attentions": output.attentions, CACHE: cache_of(output)}
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, **fields)

    def _last_tokens(self, inputs: dict[str, Any], states: Tensor) -> tuple[Tensor, Any]:
        """Index of each sequence's last real token in ``states`` (B, T, d)."""
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        last = last_token(mask, ids, self.config.pad_token_id, states.shape[1])
        return torch.arange(len(states), device=states.device), last

    def detached(self) -> PreTrainedModel:
        """Return the detached shadow as a plain sequence classifier of the backbone's own architecture.

        Its pad token is this model's ``config.pad_token_id``; without one it takes one text at a time.
        """
        return detached_classifier(self.base, self.shadow, self.shadow_score, self.config)
