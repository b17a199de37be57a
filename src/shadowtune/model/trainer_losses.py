"""Trainers that compute the loss outside of the model: checks, and the shadow's term under TRL's fused head.

TRL's trainers patch ``forward`` with a fused head: called with ``fused_lm_head=True`` it runs ``model.base_model``,
computes log-probabilities from its last hidden states, and reduces them to its own loss, without the shadow's term. Two
hooks on the model add it: one puts an empty list into the call's keywords, in which ``HeadlessModel`` leaves s0; the
other adds lambda * log p_shadow to the returned log-probabilities, with its value subtracted again. So the values stay
those of the attached model, and the gradient is that of the joint loss under any reduction: whatever a trainer credits
to a token of the attached model (DPO, KTO, GRPO), it credits, times lambda, to the same token of the detached shadow.

Trainers that compute their loss from logits (TRL's Reward, ORPO, CPO, GKD, OnlineDPO) or from the last hidden states
(Distillation) leave the shadow's term out. A hook on these stops the first backward pass through them.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from shadowtune.attach.sharding import is_dtensor, is_partitioned, whole_tensor
from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.losses import IGNORE_INDEX, LossWeights
from shadowtune.errors import ConfigError

SLOT = "shadow_initial_states"
"""The keyword by which a call's s0 comes back."""


def check_labels(labels: Any, shift_labels: Any, num_items_in_batch: Any, loses_terms: bool) -> None:
    """Check that a trainer which counts labels also passes them.

    Args:
        labels: the call's.
        shift_labels: the call's.
        num_items_in_batch: the call's; transformers' Trainer passes it in training, even where it keeps the labels.
        loses_terms: whether a loss computed outside of the model would lack terms of the model's.

    Raises:
        ConfigError: if the trainer computes the loss itself, from the logits.
    """
    if labels is None and shift_labels is not None:
        raise ConfigError(
            "shift_labels without labels: a trainer that computes the loss itself would leave out the shadow's terms; "
            "pass labels as well"
        )
    if labels is None and num_items_in_batch is not None and loses_terms:
        raise ConfigError(
            "the batch has no labels but num_items_in_batch: the trainer took them out to compute the loss itself "
            "(label_smoothing_factor or compute_loss_func), and the shadow's loss would never exist; leave these "
            "options out"
        )


def check_schedule(config: ShadowConfig, shadow_loss_weight: float | None, num_items_in_batch: Any) -> None:
    """Check that a trainer which counts labels, as transformers' does in training, applies the schedule of lambda.

    Raises:
        ConfigError: if ``shadow_loss_weight_end`` is set, and the call has no weight of its own.
    """
    end = config.shadow_loss_weight_end
    if end is not None and shadow_loss_weight is None and num_items_in_batch is not None:
        raise ConfigError(
            f"shadow_loss_weight_end={end:g} is applied by shadowtune train, and this trainer would keep "
            f"shadow_loss_weight={config.shadow_loss_weight:g}; leave it out, or pass shadow_loss_weight in each batch"
        )


def guard_output(output: Tensor, weights: LossWeights) -> None:
    """Make a backward pass through an output of the attached model an error if the joint loss has more terms.

    Args:
        output: logits or last hidden states of a call without labels in training.
        weights: of the call.
    """
    if not output.requires_grad or not (weights.shadow or weights.teach) or torch.compiler.is_compiling():
        return

    def refuse(gradient: Tensor) -> None:
        raise ConfigError(
            f"a loss was computed from the logits, without the shadow's own terms (shadow_loss_weight="
            f"{weights.shadow:g}), as TRL's Reward, ORPO, CPO, GKD, Distillation and OnlineDPO trainers do; use one "
            "that passes labels (transformers' own, SFT, DPO, KTO, GRPO, RLOO), or set shadow_loss_weight=0 (in PEFT: "
            "auxiliary_loss_weight=0) and the distillation weights to 0, which trains the attached model alone"
        )

    output.register_hook(refuse)


class HeadlessModel(nn.Module):
    """A shadow model without its head, as its ``base_model`` is expected to be."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        """Return the last hidden states before the head, (B, T, d); in mode "base" those of the base alone."""
        if self.model.mode == "base":
            decoder = self.model.architecture.decoder_of(self.model.base)
            return cast(BaseModelOutputWithPast, decoder(input_ids=input_ids, **kwargs))
        slot = kwargs.pop(SLOT, None)
        wanted = slot is not None and self.model.shadow.config.shadow_loss_weight > 0
        output, state = self.model.encode(input_ids, run_shadow=wanted, **kwargs)
        if wanted:
            slot.append(state.initial)
        elif slot is None and self.model.training and self.model.mode == "attached":
            guard_output(output.last_hidden_state, self.model.loss_weights())
        return output


def add_shadow_loss_hooks(model: Any) -> None:
    """Install the two hooks; they do nothing for calls without ``fused_lm_head=True``."""
    model.register_forward_pre_hook(_offer_slot, with_kwargs=True)
    model.register_forward_hook(_add_shadow_gradient, with_kwargs=True)


def call_fused(model: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run TRL's fused head, which patched the ``forward`` of a model's base, on the model in place of its base.

    The patched function finds the layers below the head and the head by the attributes of its first argument.
    """
    args, kwargs = _offer_slot(model, args, kwargs) or (args, kwargs)
    return _add_shadow_gradient(model, args, kwargs, forward.__func__(model, *args, **kwargs))


def _offer_slot(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("fused_lm_head") and torch.is_grad_enabled() and model.training and model.mode == "attached":
        config = model.shadow.config
        dropped = ("distillation_weight", "matching_weight", "shadow_loss_weight_end")
        names = [name for name in dropped if config.to_dict()[name]]
        names += [] if model.shadow.draft_head is None else ["draft_rank"]
        if names:
            raise ConfigError(
                f"{', '.join(names)}: trained by a loss that this trainer, which computes its own, would drop; leave "
                "it out, or train with shadowtune train"
            )
        return args, {**kwargs, SLOT: []}
    return None


def _logits(model: Any, states: Tensor) -> Tensor:
    """Apply the base's head to states (N, d) by its weight, as TRL's fused head does, where that can be read.

    A call of the head's module would let FSDP free the weight that the fused head keeps for its backward pass.
    """
    module = model.base.get_output_embeddings()
    weight = whole_tensor(module.weight) if is_dtensor(module.weight) else module.weight
    if is_partitioned(module.weight) or type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return cast(Tensor, model.logits_of(states))
    if weight.is_meta:  # offloaded
        return cast(Tensor, model.logits_of(states))
    bias = None if module.bias is None else whole_tensor(module.bias)
    return cast(Tensor, model.transform_logits(F.linear(states.to(weight), weight, bias)))


def _add_shadow_gradient(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    weight = model.shadow.config.shadow_loss_weight
    if not kwargs.get(SLOT) or weight == 0:
        return output
    if kwargs.get("shift_labels") is not None:
        targets, states = kwargs["shift_labels"], kwargs[SLOT][0]
    else:
        targets, states = kwargs["labels"][:, 1:], kwargs[SLOT][0][:, :-1]
    kept = targets != IGNORE_INDEX
    log_probs = torch.log_softmax(_logits(model, states[kept]).float(), -1)
    chosen = log_probs.gather(1, targets[kept].unsqueeze(1)).squeeze(1)
    term = output.log_probs.new_zeros(targets.shape).masked_scatter(kept, weight * chosen.to(output.log_probs.dtype))
    output.log_probs = output.log_probs + (term - term.detach())
    return output
