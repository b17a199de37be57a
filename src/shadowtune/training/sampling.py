"""The order in which rows are seen."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import RandomSampler, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochSampler(Sampler[int]):
    """A random order that seed and epoch alone decide.

    So a run that is resumed in the middle of any epoch goes on with the rows that were left, and all processes agree
    on who takes which. An order drawn from the global generator would depend on what dropout drew from it.

    Args:
        order: draws the order of one epoch.
        seed: of the run.
        epoch: returns the number of the epoch that begins, from 0.
    """

    def __init__(self, order: RandomSampler | LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.order = order
        self.order.generator = torch.Generator()
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the rows in the order of the epoch that begins."""
        self.order.generator.manual_seed(self.seed + self.epoch())
        return iter(self.order)
