"""From answers to numbers."""

import math


def normalize(text: str) -> str:
    """Fold case and white space, drop a final full stop: what two readers would call the same answer."""
    return " ".join(text.split()).casefold().removesuffix(".")


def exact_match(predictions: list[str], targets: list[str]) -> list[bool]:
    """Say for each pair whether the prediction is the target, up to ``normalize``."""
    return [normalize(p) == normalize(t) for p, t in zip(predictions, targets, strict=True)]


def accuracy_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval)."""
    if total == 0:
        return 0.0, 1.0
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
