"""A subject that is a model: a base, adapted by one of the contenders."""

import torch
from torch import nn

from shadowtune.benchmark.bases import real_base
from shadowtune.benchmark.bench import Settings
from shadowtune.benchmark.peers import Contender
from shadowtune.benchmark.timing import DTYPES, TimedSubject
from shadowtune.model.methods import trainable_parameters


class ModelSubject(TimedSubject):
    """A subclass loads a model, makes it ready for what it measures, and then calls ``mark_loaded``."""

    model: nn.Module
    vocabulary: int
    """V, from which inputs are drawn."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.dtype = DTYPES[settings.dtype]

    def load(self, base_name: str, contender: Contender, size: int | None) -> None:
        """Load a base and adapt it; the same seed gives each subject the same start."""
        torch.manual_seed(0)
        base = real_base(base_name, self.dtype, self.device)
        self.vocabulary = base.config.get_text_config(decoder=True).vocab_size
        self.model = contender.build(base, size).to(self.device)
        self.size = contender.describe(size)
        self.trainable_parameters = trainable_parameters(self.model)
