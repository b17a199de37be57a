"""The stage that trains the deferral head, after both networks are trained and without changing them.

On examples that neither network has learned, the detached shadow answers greedily, and one pass of the attached model
over prompt and answer gives the states s0 and the tokens that the attached model would choose instead. Two logistic
regressions are fitted to the states and to the probabilities of the tokens: of single tokens, and of whole answers
(``core.deferral_head``). An answer is right if
its text equals that of the labels. Answers that only the attached model has right are few, so that the second one may
learn "the attached model would replace a token" instead, and is then rescaled to them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.config.training import TrainConfig
from shadowtune.core.calibration_metrics import auroc
from shadowtune.core.deferral_head import STATISTICS, standardized_head, token_statistics
from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.data.collate import CausalCollator
from shadowtune.data.generation import generate_answers
from shadowtune.errors import ConfigError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.deferral_files import SavedDeferralHead

if TYPE_CHECKING:
    from shadowtune.training.stages import StageContext

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 30.0)
"""Candidate weights of the squared norm of the standardized weights of the states, beside the mean log-loss. With the
largest one the states hardly count."""
STATISTICS_PENALTY = 1e-3
"""That of the token statistics: the head must be able to rank as they do."""
FOLDS = 5
MAX_TOKENS = 20_000
"""Most tokens that the regression of tokens is fitted to, the first ones."""


class AnsweredExample(NamedTuple):
    """One answer of the detached shadow, compared with the attached model's."""

    states: Tensor
    """s0 that each of its T tokens was read off, (T, d), float32, on the CPU."""
    statistics: Tensor
    """Of each token, (T, 3), float32."""
    differs: Tensor
    """1 where the attached model would choose another token after the same text, (T,), float32."""
    helps: float
    """1 if the attached model's own answer is right and this one is wrong."""


class LogisticFit(NamedTuple):
    """A logistic regression, with its quality on examples that it was not fitted to."""

    weight: Tensor
    """(d + 3,), of standardized inputs."""
    bias: Tensor
    """()."""
    mean: Tensor
    """(d + 3,), of the inputs."""
    spread: Tensor
    """(d + 3,), of the inputs."""
    quality: dict[str, float]


@dataclass(frozen=True)
class DeferralHeadStage:
    """Fits the deferral head on examples that were set aside; no weight of the model changes."""

    name = "deferral_head"

    def applies(self, config: TrainConfig) -> bool:
        """Where ``deferral_fraction`` is set, in the run on the task."""
        return config.trains_deferral_head

    def run(self, context: "StageContext") -> dict[str, Any]:
        """Fit the head and put it into ``context.deferral_head``; uses ``deferral_examples``, else ``eval_dataset``.

        Raises:
            ConfigError: without a tokenizer, examples, or a language model with a shadow.
        """
        start = time.perf_counter()
        examples = context.eval_dataset if context.deferral_examples is None else context.deferral_examples
        if context.tokenizer is None or not examples:
            raise ConfigError(
                "the deferral head learns from answers to examples that the networks have not learned: give a "
                "tokenizer, and an eval_dataset or deferral_examples"
            )
        if not isinstance(context.model, ShadowForCausalLM):
            raise ConfigError(
                f"a deferral head needs a language model with a shadow, not {type(context.model).__name__}"
            )
        context.report(f"deferral head: both networks answer {len(examples)} prompts")
        answered = answer_examples(context.model, context.tokenizer, examples, context.batch_size)
        context.deferral_head = fit_deferral_head(answered)
        for line in quality_lines(context.deferral_head.quality):
            context.report(f"deferral head: {line}")
        return {"deferral_seconds": time.perf_counter() - start}


def quality_lines(quality: Any) -> Iterator[str]:
    """Yield a sentence on each of the two outputs."""
    for name, what in (("differs", "tokens that the attached model would replace"), ("helps", "better answers")):
        share = f"{quality[f'{name}_positive']:g} of {quality[f'{name}_count']:g} are {what}"
        if quality[f"{name}_positive"] in (0, quality[f"{name}_count"]):
            yield f"{share}, so that nothing was to be learned: its probability is constant"
        else:
            yield f"{share}, found with AUROC {quality[f'{name}_auroc']:.3f} out of fold"


@torch.no_grad()
def answer_examples(
    model: ShadowForCausalLM, tokenizer: Any, examples: Sequence[dict[str, Any]], batch_size: int
) -> list[AnsweredExample]:
    """Let both networks answer, and compare the answers.

    Args:
        model: in any mode, which is kept; left in eval mode.
        tokenizer: of the model.
        examples: encoded, with ``input_ids`` and ``labels``; the tokens before the first label are the prompt.
        batch_size: examples at a time.
    """
    prompts, references = [], []
    for example in examples:
        labels = example["labels"]
        begin = next(position for position, label in enumerate(labels) if position and label != IGNORE_INDEX)
        prompts.append(list(example["input_ids"][:begin]))
        references.append([label for label in labels[begin:] if label != IGNORE_INDEX])
    longest, before = max(map(len, references)), model.mode
    try:
        detached, attached = (
            generate_answers(model.set_mode(mode), tokenizer, prompts, longest, batch_size)[1]
            for mode in ("detached", "attached")
        )
        compared = _compare_tokens(model.set_mode("attached"), prompts, detached, tokenizer.pad_token_id, batch_size)
        texts = ([_text(tokenizer, ids) for ids in side] for side in (detached, attached, references))
        right = [(edge == correct, cloud == correct) for edge, cloud, correct in zip(*texts, strict=True)]
        return [
            AnsweredExample(*tokens, float(cloud and not edge))
            for tokens, (edge, cloud) in zip(compared, right, strict=True)
        ]
    finally:
        model.set_mode(before)


def _compare_tokens(
    model: ShadowForCausalLM, prompts: list[list[int]], answers: list[list[int]], pad: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield states, statistics and differences of each answer, by one attached pass over prompts and answers."""
    collate = CausalCollator(pad)
    for start in range(0, len(prompts), batch_size):
        chosen = range(start, min(start + batch_size, len(prompts)))
        whole = [{"input_ids": prompts[index] + answers[index]} for index in chosen]
        batch = collate([{**each, "labels": each["input_ids"]} for each in whole])
        ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
        output, state = model.encode(ids, mask, use_cache=False, run_shadow=True)
        assert output.last_hidden_state is not None and state.initial is not None
        for row, index in enumerate(chosen):
            answer, begin = torch.tensor(answers[index], device=model.device), len(prompts[index]) - 1
            reads = slice(begin, begin + len(answer))
            differs = model.logits_of(output.last_hidden_state[row, reads]).argmax(-1) != answer
            states = state.initial[row, reads]
            statistics = token_statistics(model.logits_of(states), answer)
            yield states.float().cpu(), statistics.cpu(), differs.float().cpu()


def fit_deferral_head(answered: Sequence[AnsweredExample]) -> SavedDeferralHead:
    """Fit both outputs.

    Args:
        answered: at least one example.
    """
    lengths = torch.tensor([len(each.states) for each in answered])
    numbers = torch.arange(len(answered))
    inputs = [torch.cat([each.states, each.statistics], 1) for each in answered]
    differs = torch.cat([each.differs for each in answered])[:MAX_TOKENS]
    means = torch.stack([each.mean(0) for each in inputs])
    helps = torch.tensor([each.helps for each in answered])
    replaced = torch.stack([each.differs.max() for each in answered])
    fits = {
        "differs": fit_logistic(
            torch.cat(inputs)[:MAX_TOKENS], differs, numbers.repeat_interleave(lengths)[:MAX_TOKENS]
        ),
        "helps": fit_logistic(means, helps, numbers, replaced),
    }
    weight, bias, mean, spread = (torch.stack(parts) for parts in zip(*(fit[:4] for fit in fits.values()), strict=True))
    quality = {f"{name}_{key}": value for name, fit in fits.items() for key, value in fit.quality.items()}
    return SavedDeferralHead(standardized_head(weight, bias, mean, spread), quality)


def fit_logistic(inputs: Tensor, labels: Tensor, groups: Tensor, proxy: Tensor | None = None) -> LogisticFit:
    """Fit a logistic regression whose penalty is chosen by cross-validation.

    The log-odds are rescaled by two parameters that are fitted to those out of fold (Platt scaling), so that they are
    neither overconfident nor shrunk by the penalty.

    Args:
        inputs: (N, d + 3): states, and statistics, whose penalty is ``STATISTICS_PENALTY``.
        labels: (N,), 0 or 1. If all are equal, the weights are 0 and the bias has the smoothed share.
        groups: (N,), int; inputs of one group are in one fold.
        proxy: (N,), other labels that may be learned in place of ``labels`` where these are rare: those whose rescaled
            log-odds have the smaller log-loss of ``labels`` are taken.
    """
    inputs, labels = inputs.double(), labels.double()
    count, positive = len(labels), float(labels.sum())
    mean = inputs.mean(0)
    spread = inputs.std(0, correction=0).clamp_min(1e-12)
    spread = spread.maximum(1e-6 * inputs.abs().amax(0))  # of constant inputs
    quality = {"count": float(count), "positive": positive}
    if positive in (0, count):
        bias = torch.tensor((positive + 1) / (count - positive + 1), dtype=torch.float64).log()
        return LogisticFit(torch.zeros_like(mean), bias, mean, spread, {**quality, "auroc": 0.5})
    standardized = (inputs - mean) / spread
    folds = groups % min(FOLDS, int(groups.max()) + 1)
    learned = [labels] if proxy is None or len(proxy.unique()) < 2 else [labels, proxy.double()]
    found = []
    for number, targets in enumerate(learned):
        for penalty in PENALTIES:
            odds = _out_of_fold(standardized, targets, folds, penalty)
            slope, offset = _rescaling(odds, labels)
            rescaled = slope * odds + offset
            found.append((float(_log_loss(rescaled, labels)), number, penalty, slope, offset, rescaled))
    loss, number, penalty, slope, offset, rescaled = min(found, key=lambda each: each[0])
    weight, bias = _fit(standardized, learned[number], penalty)
    quality |= {"auroc": auroc(rescaled.numpy(), labels.numpy()), "penalty": penalty, "proxy": float(number)}
    return LogisticFit(slope * weight, slope * bias + offset, mean, spread, {**quality, "log_loss": loss})


def _rescaling(log_odds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope (at least 0) and offset with which log-odds (N,) fit labels (N,) of both kinds best."""
    spread = log_odds.std(correction=0).clamp_min(1e-9)
    slope, offset = _fit(log_odds[:, None] / spread, labels, 1e-6, statistics=0)
    if slope[0] > 0:
        return slope[0] / spread, offset
    return torch.zeros_like(offset), (labels.mean() / (1 - labels.mean())).log()


def _out_of_fold(inputs: Tensor, labels: Tensor, folds: Tensor, penalty: float) -> Tensor:
    """Return the log-odds (N,) of each input by a regression that was fitted without its fold."""
    found = torch.zeros_like(labels)
    for fold in folds.unique():
        left_out = folds == fold
        if bool(left_out.all()):
            left_out = torch.zeros_like(left_out)
        weight, bias = _fit(inputs[~left_out], labels[~left_out], penalty)
        found[folds == fold] = inputs[folds == fold] @ weight + bias
    return found


def _fit(inputs: Tensor, labels: Tensor, penalty: float, statistics: int = STATISTICS) -> tuple[Tensor, Tensor]:
    """Return weights (d,) and bias; the last ``statistics`` inputs have ``STATISTICS_PENALTY``."""
    penalties = torch.full((inputs.shape[1],), penalty, dtype=inputs.dtype)
    penalties[inputs.shape[1] - statistics :] = STATISTICS_PENALTY
    parameters = torch.zeros(inputs.shape[1] + 1, dtype=inputs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def loss() -> Tensor:
        optimizer.zero_grad()
        value = _log_loss(inputs @ parameters[1:] + parameters[0], labels) + (penalties * parameters[1:].square()).sum()
        value.backward()
        return value

    step: Callable[[Callable[[], Tensor]], Any] = optimizer.step
    step(loss)
    fitted = parameters.detach()
    return fitted[1:], fitted[0]


def _log_loss(log_odds: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(log_odds, labels)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
