"""Metrics: the score of an answer, between 0 and 1, and the confidence interval of a mean score."""

import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)[-+]?\.\d+")
"""A decimal number, with or without thousands separators; a minus between two numbers is no sign."""
_CHOICE = re.compile(r"\b(?:[BCD]|A(?!\s+(?!is\b)[a-z]))\b")
"""A single capital letter as a word; "A" before a word in small letters is an article."""
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
NO_ANSWERS = ("unanswerable", "no answer", "")
"""Answers that mean "no answer", normalized as by ``normalize_span``."""

Metric = Callable[[str, Sequence[str]], dict[str, float]]
"""(answer, all correct answers) -> named scores, the first of which is the main one."""


def normalize(text: str) -> str:
    """Fold case and white space, drop a final full stop."""
    return " ".join(text.split()).casefold().removesuffix(".")


def normalize_span(text: str) -> str:
    """Fold case and white space, drop punctuation and articles, as SQuAD's official script does."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def last_number(text: str) -> Decimal | None:
    """Return the number after the last "####", else the last number of the text; None if there is none."""
    marked = _NUMBER.findall(text.rpartition("####")[2]) if "####" in text else []
    found = marked[:1] or _NUMBER.findall(text)[-1:]
    return Decimal(found[0].replace(",", "")) if found else None


def chosen_letter(text: str) -> str | None:
    """Return the first of the letters A to D that is a word by itself; None if there is none."""
    found = _CHOICE.search(text)
    return None if found is None else found[0]


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of an answer's words, both normalized as spans.

    Where either has no words it is 1 if both have none, else 0.
    """
    given, expected = normalize_span(answer).split(), normalize_span(reference).split()
    if not given or not expected:
        return float(given == expected)
    return 2 * (Counter(given) & Counter(expected)).total() / (len(given) + len(expected))


def _exact_match(answer: str, references: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(normalize(answer) in map(normalize, references))}


def _label(answer: str, references: Sequence[str]) -> dict[str, float]:
    given = normalize(_first_line(answer)).replace("_", " ")
    return {"label": float(given in (normalize(reference).replace("_", " ") for reference in references))}


def _number(answer: str, references: Sequence[str]) -> dict[str, float]:
    given = last_number(answer)
    return {"number": float(given is not None and given in map(last_number, references))}


def _choice(answer: str, references: Sequence[str]) -> dict[str, float]:
    given = chosen_letter(answer)
    return {"choice": float(given is not None and given in references)}


def _squad(answer: str, references: Sequence[str]) -> dict[str, float]:
    given = _span(_first_line(answer))
    spans = [_span(reference) for reference in references]
    return {
        "exact_match": float(normalize_span(given) in map(normalize_span, spans)),
        "f1": max(token_f1(given, span) for span in spans),
    }


def _f1(answer: str, references: Sequence[str]) -> dict[str, float]:
    return dict(reversed(_squad(answer, references).items()))


METRICS: dict[str, Metric] = {
    "exact_match": _exact_match,
    "label": _label,
    "number": _number,
    "choice": _choice,
    "squad": _squad,
    "f1": _f1,
}
"""By ``TaskConfig.metric``. "label" and "squad" judge an answer's first line; "f1" is "squad" with f1 as main score."""


def _first_line(answer: str) -> str:
    return answer.strip().partition("\n")[0]


def _span(text: str) -> str:
    """Return an answer as a span: empty if it means "no answer"."""
    return "" if normalize_span(text) in NO_ANSWERS else text


def score_answers(
    metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[float], dict[str, float]]:
    """Score answers.

    Args:
        metric: one of ``METRICS``.
        answers: of a model.
        references: for each answer, all correct ones.

    Returns:
        The main score of each answer, and the means of the metric's other scores by their names.
    """
    scores = [METRICS[metric](answer, right) for answer, right in zip(answers, references, strict=True)]
    main, *others = scores[0]
    return [score[main] for score in scores], {name: statistics.fmean(s[name] for s in scores) for name in others}


def mean_interval(scores: Sequence[float], z: float = 1.96) -> tuple[float, float]:
    """95 % interval of the mean of scores between 0 and 1: Wilson's of a share, else by the normal distribution.

    Where all scores are the same number between 0 and 1, it is as wide as for a share that was seen 0 times.
    """
    if all(score in (0.0, 1.0) for score in scores):
        return accuracy_interval(round(sum(scores)), len(scores), z)
    if len(set(scores)) == 1:
        wide = accuracy_interval(0, len(scores), z)[1]
        return max(0.0, scores[0] - wide), min(1.0, scores[0] + wide)
    half = z * statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 1.0
    mean = statistics.fmean(scores)
    return max(0.0, mean - half), min(1.0, mean + half)


def accuracy_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval)."""
    if total == 0:
        return 0.0, 1.0
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
