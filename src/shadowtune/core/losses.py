r"""Losses: cross-entropy at labelled positions, the joint loss of both networks, and distillation into the shadow.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 8-9:  loss = CE(head(h_L), y) + lambda * CE(head(s_0), y); and, if
asked for, + mu * tau^2 KL(p_tau(h_L) || p_tau(s_0)) + nu * |s_0 - h_L|^2 / |h_L|^2, by which the detached shadow learns
from the attached model. h_L gets no gradient of the last two. In shadow-only training, without CE(head(h_L), y), the
shadow learns from the bare base.

Only positions whose next token is labelled reach a head: on text with 2 % of its tokens labelled, 98 % of the
vocabulary products would be wasted.

Distillation can use the teacher's k most likely tokens instead of its whole vocabulary. The teacher's distribution at
temperature tau is cut to them and renormalized: p. The student, with logits b, has q = softmax(b / tau). The divergence
needs the student's cross-entropy against any one token y and its logits at the k tokens, because
log q_j = log q_y + (b_j - b_y) / tau:

    KL(p, q) = sum_j p_j log p_j  +  CE(q, y)  +  (b_y - sum_j p_j b_j) / tau

Behind a linear head the last term is s . (w_y - sum_j p_j w_j), a weighted sum of the head's rows. At tau = 1 the
cross-entropy against the label is already there, so the student needs no further product with the vocabulary.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.core.kernels.linear_cross_entropy import (
    Head,
    at_least_float32,
    fused_linear_cross_entropy,
    product_dtype,
)
from shadowtune.errors import ConfigError

IGNORE_INDEX = -100
"""The label of a position without a loss, as everywhere in transformers."""
VECTORS_AT_ONCE = 256
"""Vectors whose logits ``top_tokens`` holds at a time: 256 MB in float32 for a vocabulary of 262,144."""


class LossWeights(NamedTuple):
    """Weights of the shadow's terms; a term of weight 0 is not computed."""

    shadow: float
    """lambda."""
    distillation: float = 0.0
    """mu."""
    temperature: float = 1.0
    """tau."""
    matching: float = 0.0
    """nu."""
    top_k: int | None = None
    """Number of the teacher's most likely tokens that the distillation uses; None: all."""

    @property
    def teach(self) -> bool:
        """Whether the shadow learns from another model."""
        return self.distillation > 0 or self.matching > 0


class JointLoss(NamedTuple):
    """Scalars: ``total`` = ``base`` + lambda ``shadow`` + mu ``distillation`` + nu ``matching`` + ``draft``.

    A term that is not needed is None.
    """

    total: Tensor
    base: Tensor | None
    shadow: Tensor | None
    distillation: Tensor | None = None
    matching: Tensor | None = None
    draft: Tensor | None = None


class CrossEntropySums(NamedTuple):
    """Sums over the labelled vectors: scalars, at least float32."""

    base: Tensor
    """Cross-entropy of h."""
    shadow: Tensor | None
    """Cross-entropy of s; None without s."""
    divergence: Tensor | None
    """temperature^2 KL(softmax of h || softmax of s); its gradient goes to s alone. None unless asked for."""


class TopTokens(NamedTuple):
    """The k most likely next tokens of a teacher."""

    tokens: Tensor
    """(..., k) int64, the most likely first."""
    log_probabilities: Tensor
    """(..., k), at least float32; their exponentials sum to 1 over k."""


# Cross-entropy behind a head.


def shift_and_select(labels: Tensor, *hidden_states: Tensor) -> tuple[Tensor, ...]:
    """Shift labels by one and select the hidden states whose next token is labelled.

    Args:
        labels: (B, T) token ids, IGNORE_INDEX where nothing is to be predicted.
        hidden_states: any number of (B, T, d) tensors.

    Returns:
        The N targets, then the N selected vectors (N, d) of each tensor. While torch compiles, all B * (T - 1) stay,
        the unlabelled ones with target IGNORE_INDEX, because their number must not depend on the data.

    Raises:
        ConfigError: if labels and hidden states are not of the same positions, or a label is negative and not
            IGNORE_INDEX; as an index it would count from the end of the vocabulary.
    """
    if any(hidden.shape[:-1] != labels.shape for hidden in hidden_states):
        shapes = ", ".join(str(tuple(hidden.shape[:-1])) for hidden in hidden_states)
        raise ConfigError(
            f"labels have shape {tuple(labels.shape)} beside states of {shapes}; give each position of the input a "
            "label, -100 where there is no loss"
        )
    targets = labels[:, 1:].reshape(-1)
    vectors = [hidden[:, :-1].reshape(-1, hidden.shape[-1]) for hidden in hidden_states]
    if torch.compiler.is_compiling():
        return (targets, *vectors)
    kept = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    targets = targets[kept]
    if not targets.is_meta and bool((targets < 0).any()):
        raise ConfigError(f"labels hold {int(targets.min())}; only {IGNORE_INDEX} means that there is no loss")
    return (targets, *(vector[kept] for vector in vectors))


def linear_cross_entropy(
    head: Head, h: Tensor, s: Tensor | None, targets: Tensor, temperature: float | None = None
) -> CrossEntropySums:
    """Compute the cross-entropies of both networks behind one head, and their divergence.

    Args:
        head: the base's. If its weight is known, ``fused_linear_cross_entropy`` computes the sums in one pass over the
            vocabulary; otherwise, and while torch compiles, ``linear_cross_entropy_reference``.
        h: (N, d), the attached model's last hidden states.
        s: (N, d), the shadow's; None if it has no loss.
        targets: (N,), IGNORE_INDEX where there is no loss.
        temperature: of the divergence, which is left out if None.

    Returns:
        The sums. They have no second derivatives if the weight is known.
    """
    if head.weight is None or torch.compiler.is_compiling():
        return linear_cross_entropy_reference(head, h, s, targets, temperature)
    kept = targets != IGNORE_INDEX
    return CrossEntropySums(*fused_linear_cross_entropy(head, h, s, targets.clamp(min=0), kept, temperature))


def linear_cross_entropy_reference(
    head: Head, h: Tensor, s: Tensor | None, targets: Tensor, temperature: float | None = None
) -> CrossEntropySums:
    """Compute the sums by autograd from all logits; arguments as in ``linear_cross_entropy``."""
    logits = at_least_float32(head.apply(h))
    base = summed_cross_entropy(logits, targets)
    if s is None:
        return CrossEntropySums(base, None, None)
    shadow_logits = at_least_float32(head.apply(s))
    shadow = summed_cross_entropy(shadow_logits, targets)
    if temperature is None:
        return CrossEntropySums(base, shadow, None)
    p, q = (F.log_softmax(x / temperature, -1) for x in (logits.detach(), shadow_logits))
    each = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return CrossEntropySums(base, shadow, temperature**2 * (each * (targets != IGNORE_INDEX)).sum())


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropies of (N, V) logits against (N,) targets, at least in float32."""
    return F.cross_entropy(at_least_float32(logits), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def token_cross_entropy(logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of (N, V) logits against (N,) targets, at least in float32, summed and divided by the item count.

    Args:
        num_items_in_batch: labelled tokens of the whole optimizer step, over all its micro-batches and processes; by
            default those of this call. Both terms of the joint loss use it, so lambda keeps its meaning under
            gradient accumulation.

    Returns:
        A scalar; exactly zero, with a gradient of zero, when no position is labelled.
    """
    total = summed_cross_entropy(logits, targets)
    return normalize(total, (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)


# The joint loss of causal language models.


def joint_causal_loss(
    head: Head,
    hidden_states: Tensor,
    initial_states: Tensor | None,
    labels: Tensor,
    weights: LossWeights,
    num_items_in_batch: Tensor | int | None = None,
) -> JointLoss:
    """Joint loss of causal language modelling (Eq. 8-9), with distillation from the attached model into the shadow.

    Args:
        head: the base's.
        hidden_states: (B, T, d), the attached model's last hidden states, after the final norm.
        initial_states: s0, (B, T, d); None if all weights of the shadow's terms are 0.
        labels: (B, T), unshifted.
        weights: of the shadow's terms.
        num_items_in_batch: labelled tokens of the whole optimizer step; by default those of this call.
    """
    if initial_states is None:
        assert not (weights.shadow or weights.teach)
        targets, h = shift_and_select(labels, hidden_states)
        sums = linear_cross_entropy(head, h, None, targets)
        return _mean_terms(sums, h, h, targets, weights, num_items_in_batch)
    targets, h, s = shift_and_select(labels, hidden_states, initial_states)
    no_product = weights.shadow == weights.distillation == 0
    states = None if no_product else s.to(h.dtype)  # the vocabulary's product is half of the cost
    whole = weights.distillation > 0 and weights.top_k is None
    sums = linear_cross_entropy(head, h, states, targets, weights.temperature if whole else None)
    if states is not None and weights.distillation and weights.top_k is not None:
        top = top_tokens(head, h, weights.top_k, weights.temperature)
        divergence = top_divergence(head, states, targets, top, weights.temperature, sums.shadow)
        sums = sums._replace(divergence=divergence)
    return _mean_terms(sums, s, h, targets, weights, num_items_in_batch)


def detached_causal_loss(
    head: Head,
    initial_states: Tensor,
    labels: Tensor,
    weights: LossWeights,
    num_items_in_batch: Tensor | int | None = None,
    teacher: Tensor | TopTokens | None = None,
) -> JointLoss:
    """Loss of shadow-only training: from the text, and from a teacher that does not run beside the shadow.

    Args:
        head: the base's.
        initial_states: s0, (B, T, d).
        labels: (B, T), unshifted.
        weights: of the shadow's terms; those of a missing teacher must be 0.
        num_items_in_batch: labelled tokens of the whole optimizer step; by default those of this call.
        teacher: its last hidden states (B, T, d), or its most likely tokens (B, T, k), which have nothing to match.
    """
    given = (teacher,) if isinstance(teacher, Tensor) else teacher or ()
    targets, s, *selected = shift_and_select(labels, initial_states, *given)
    h = selected[0] if isinstance(teacher, Tensor) else None
    shadow = divergence = None
    if weights.distillation and h is not None and weights.top_k is None:
        _, shadow, divergence = linear_cross_entropy(head, h, s.to(h.dtype), targets, weights.temperature)
    elif weights.shadow or weights.distillation:
        shadow = linear_cross_entropy(head, s, None, targets).base
    if weights.distillation and divergence is None:
        k = cast(int, weights.top_k)
        top = TopTokens(*selected) if h is None else top_tokens(head, h, k, weights.temperature)
        divergence = top_divergence(head, s, targets, top, weights.temperature, shadow)
    return _mean_terms((None, shadow, divergence), s, h, targets, weights, num_items_in_batch)


def _mean_terms(
    sums: tuple[Tensor | None, Tensor | None, Tensor | None],
    s: Tensor,
    h: Tensor | None,
    targets: Tensor,
    weights: LossWeights,
    num_items_in_batch: Tensor | int | None,
) -> JointLoss:
    """Divide (base, shadow, divergence) by the number of items; add the matching term of s and h, both (N, d)."""
    kept = targets != IGNORE_INDEX
    count = kept.sum() if num_items_in_batch is None else num_items_in_batch
    matching = None
    if weights.matching:
        assert h is not None
        matching = relative_squared_error(s, h.detach(), kept)
    base, shadow, distillation, matching = (
        None if each is None else normalize(each, count) for each in (*sums, matching)
    )
    total = weighted_sum(base, shadow, distillation, matching, weights)
    return JointLoss(total, base, shadow, distillation, matching)


def relative_squared_error(states: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
    """Sum over the kept vectors of |s - h|^2 / |h|^2, for states and targets (N, d) and ``kept`` (N,)."""
    wide, aim = at_least_float32(states), at_least_float32(targets)
    each = (wide - aim).square().sum(-1) / aim.square().sum(-1).clamp(min=torch.finfo(aim.dtype).tiny)
    return (each * kept).sum()


def weighted_sum(
    base: Tensor | None,
    shadow: Tensor | None,
    distillation: Tensor | None,
    matching: Tensor | None,
    weights: LossWeights,
) -> Tensor:
    """Add the terms that are there, at least one, each with its weight."""
    terms = ((1, base), (weights.shadow, shadow), (weights.distillation, distillation), (weights.matching, matching))
    first, *others = (term if weight == 1 else weight * term for weight, term in terms if term is not None and weight)
    return sum(others, first)


def normalize(total: Tensor, count: Tensor | int) -> Tensor:
    """Return ``total`` / ``count``; 0 / 0 is 0."""
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


# Distillation from the teacher's k most likely tokens.


@torch.no_grad()
def top_tokens(head: Head, hidden_states: Tensor, k: int, temperature: float) -> TopTokens:
    """Find the teacher's most likely tokens, some vectors at a time; while torch compiles, all at once.

    Args:
        head: the base's.
        hidden_states: (N, d), the teacher's last.
        k: at most the size of the vocabulary.
        temperature: tau.

    Returns:
        (N, k) of both.
    """
    size = max(1, len(hidden_states)) if torch.compiler.is_compiling() else VECTORS_AT_ONCE
    parts = [at_least_float32(head.apply(some)).topk(k) for some in hidden_states.split(size)]
    logits, tokens = (torch.cat(each) for each in zip(*parts, strict=True))
    return TopTokens(tokens, F.log_softmax(logits / temperature, -1))


def top_divergence(
    head: Head, s: Tensor, targets: Tensor, top: TopTokens, temperature: float, cross_entropy: Tensor | None = None
) -> Tensor:
    """Sum temperature^2 KL(top || softmax of the logits of s over the temperature) over the labelled vectors.

    Args:
        head: the base's. If its weight is known and it has no logits transform, the cost is a weighted sum of its rows
            and, at temperatures other than 1, one pass over the vocabulary; otherwise, and while torch compiles, all
            logits.
        s: (N, d), the student's last hidden states.
        targets: (N,), IGNORE_INDEX where there is no loss.
        top: (N, k) of the teacher.
        temperature: tau, of both.
        cross_entropy: of s against the targets, a sum over the labelled vectors, if it is known.

    Returns:
        A scalar, at least float32.
    """
    if head.weight is None or head.logits_transform is not None or torch.compiler.is_compiling():
        return top_divergence_reference(head, s, targets, top, temperature)
    kept, labels = targets != IGNORE_INDEX, targets.clamp(min=0)
    if cross_entropy is None or temperature != 1:
        tempered = head._replace(logits_transform=lambda logits: logits / temperature)
        cross_entropy = fused_linear_cross_entropy(tempered, s, None, labels, kept, None)[0]
    x = s.to(product_dtype(head))
    chosen, indices = top.tokens.unique(return_inverse=True)
    rows = at_least_float32(head.weight[chosen].to(x.dtype))  # rounded as in the products, but summed in float32
    p = top.log_probabilities.exp().to(rows.dtype)
    expected = F.embedding_bag(indices, rows, mode="sum", per_sample_weights=p)
    lead = (x * (at_least_float32(head.weight[labels].to(x.dtype)) - expected)).sum(-1)
    if head.bias is not None:
        lead = lead + head.bias[labels] - (p * head.bias[top.tokens]).sum(-1)
    each = (p * top.log_probabilities).sum(-1) + lead / temperature
    return temperature**2 * (cross_entropy + (each * kept).sum())


def top_divergence_reference(head: Head, s: Tensor, targets: Tensor, top: TopTokens, temperature: float) -> Tensor:
    """Compute the divergence by its definition from all logits; arguments as in ``top_divergence``."""
    log_q = F.log_softmax(at_least_float32(head.apply(s)) / temperature, -1).gather(-1, top.tokens)
    log_p = top.log_probabilities
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * (each * (targets != IGNORE_INDEX)).sum()


# Classification.


def joint_classification_loss(
    logits: Tensor,
    shadow_logits: Tensor | None,
    hidden_states: Tensor,
    initial_states: Tensor | None,
    labels: Tensor,
    weights: LossWeights,
    problem_type: str | None = None,
    num_items_in_batch: Tensor | int | None = None,
    example_weights: Tensor | None = None,
) -> JointLoss:
    """Joint loss of classification (Eq. 8-9), with distillation from the attached model into the shadow.

    With several classes or numbers to predict, the distillation is the squared difference of the logits.

    Args:
        logits: (B, C), of the attached model.
        shadow_logits: (B, C), of the shadow; None if all weights of its terms are 0.
        hidden_states: (B, d), the head's inputs for ``logits``.
        initial_states: (B, d), the head's inputs for ``shadow_logits``; None likewise.
        labels: as in ``classification_loss``.
        weights: of the shadow's terms.
        problem_type: as in ``classification_loss``.
        num_items_in_batch: as there.
        example_weights: as there; the distillation has no weights.
    """
    base = classification_loss(logits, labels, problem_type, num_items_in_batch, example_weights)
    if shadow_logits is None or initial_states is None:
        assert not (weights.shadow or weights.teach)
        return JointLoss(base, base, None)
    shadow = classification_loss(shadow_logits, labels, problem_type, num_items_in_batch, example_weights)
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    distillation = matching = None
    if weights.distillation:
        teacher, student = at_least_float32(logits.detach()), at_least_float32(shadow_logits)
        if problem_type_of(logits, labels, problem_type) == "single_label_classification":
            p, q = (F.log_softmax(x / weights.temperature, -1) for x in (teacher, student))
            total = weights.temperature**2 * F.kl_div(q, p, reduction="sum", log_target=True)
        else:
            total = F.mse_loss(student, teacher, reduction="sum")
        distillation = normalize(total, count)
    if weights.matching:
        kept = torch.ones_like(hidden_states[:, 0], dtype=torch.bool)
        total = relative_squared_error(initial_states, hidden_states.detach(), kept)
        matching = normalize(total, len(hidden_states))
    total = weighted_sum(base, shadow, distillation, matching, weights)
    return JointLoss(total, base, shadow, distillation, matching)


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    problem_type: str | None = None,
    num_items_in_batch: Tensor | int | None = None,
    example_weights: Tensor | None = None,
) -> Tensor:
    """Loss of (B, C) class logits: squared error, cross-entropy or binary cross-entropy, as transformers chooses.

    Args:
        logits: (B, C).
        labels: (B,) integers for one class of C; numbers for regression; (B, C) zeros and ones for several classes.
        problem_type: "regression", "single_label_classification", "multi_label_classification", or None to derive it
            from C and the dtype of the labels.
        num_items_in_batch: labels (B, or B * C) of the whole optimizer step; by default those of this call.
        example_weights: (B,) factors of the examples' losses, for one class of C; None weighs all alike. They do not
            change the count.

    Returns:
        A scalar: the mean over the labels.
    """
    problem_type = problem_type_of(logits, labels, problem_type)
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    wide = at_least_float32(logits)
    if problem_type == "single_label_classification":
        if example_weights is None:
            total = F.cross_entropy(wide, labels.view(-1), reduction="sum")
        else:
            total = (F.cross_entropy(wide, labels.view(-1), reduction="none") * example_weights).sum()
    elif problem_type == "regression":
        total = F.mse_loss(wide, labels.to(wide.dtype).view_as(wide), reduction="sum")
    else:
        total = F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="sum")
    return normalize(total, count)


def problem_type_of(logits: Tensor, labels: Tensor, problem_type: str | None) -> str:
    """Return the given problem type, or derive it from C and the dtype of the labels."""
    if problem_type is not None:
        return problem_type
    if logits.shape[-1] == 1:
        return "regression"
    whole = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if whole else "multi_label_classification"
