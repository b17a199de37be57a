"""``bench passes``: one pass over n new tokens behind a cache, in tokens per second: what speculative decoding pays.

A draft of n - 1 tokens pays if a pass over n tokens, and the n - 1 steps of the drafter, take less time than as many
passes over one token as tokens of it stand. Peers: the bare base; the attached model whose products of few rows are all
computed as x W^T ("as-usual"); and n steps of the drafter ("drafting"): backbone, head and choice.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache

from shadowtune.attach.cache import split_cache
from shadowtune.benchmark.bases import MODEL_HELP, base_config, check_length, real_base
from shadowtune.benchmark.bench import Bench, Case, Plan, Settings, check_known, integers, option, words
from shadowtune.benchmark.speculate import load_model
from shadowtune.benchmark.timing import DTYPES, TimedSubject
from shadowtune.config.speculation import SpeculationConfig
from shadowtune.core.prepacked_linear import PRODUCTS_BEFORE_PACKING, TRANSPOSED_ROWS, prepacked_linear
from shadowtune.errors import ConfigError
from shadowtune.model.speculation.decoding import drop_last
from shadowtune.model.speculation.drafters import make_drafter

PEERS = ("base", "as-usual", "drafting")


@dataclass(frozen=True)
class PassesSettings(Settings):
    """Settings of ``bench passes``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    adapter: str | None = option(None, "a saved shadow of the base, as RUN/model; default: an untrained one")
    peers: tuple[str, ...] = option(PEERS, f"with what: any of {', '.join(PEERS)}", words)
    tokens: tuple[int, ...] = option((1, 2, 3, 4, 6, 8, 16, 32), "new tokens of a pass, each a case", integers)
    past: int = option(128, "tokens in the cache before it", int)
    bounds = {**Settings.bounds, "past": (1, None)}
    counts = ("tokens",)


def plan(settings: PassesSettings) -> Plan:
    """Check that all is known and fits; a case for each number of tokens.

    Raises:
        ShadowtuneError: one of its kinds, if a peer is unknown, or the base cannot be found or is too short.
    """
    check_known(settings.peers, PEERS)
    if not settings.peers:
        raise ConfigError(f"--peers must name some of {', '.join(PEERS)}")
    check_length(base_config(settings.model), settings.past + max(settings.tokens), settings.model)
    cases = tuple(Case(f"tokens={count}", {"tokens": count}) for count in settings.tokens)
    return Plan({name: {} for name in ("attached", *settings.peers)}, cases)


class PassesSubject(TimedSubject):
    """A model that reads a few more tokens, or drafts them, and forgets them again."""

    def __init__(self, settings: PassesSettings, name: str) -> None:
        super().__init__(settings)
        self.name, self.past = name, settings.past
        torch.manual_seed(0)
        self.model = load_model(real_base(settings.model, DTYPES[settings.dtype], self.device), settings.adapter)
        self.model.set_mode("base" if name == "base" else "attached")
        self.drafter = make_drafter(SpeculationConfig(drafter="shadow"), self.model, LogitsProcessorList(), False)
        self.mark_loaded(self.model)
        self.products = ExitStack()
        if name != "as-usual":
            self.products.enter_context(prepacked_linear(self.model))  # until this process ends, as in the server
        self.ids = torch.zeros(1, 0, dtype=torch.long)
        self.cache: Cache = DynamicCache(config=self.model.config)

    def prepare(self, values: Mapping[str, int]) -> float:
        """Fill the cache and warm up; return the peak memory of a pass, MB."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.model.config.vocab_size, (1, self.past + values["tokens"]), generator=generator)
        past, self.ids = ids.to(self.device).split((self.past, values["tokens"]), 1)
        owner = self.model.base if self.name == "base" else self.model
        self.cache = DynamicCache(config=owner.config)
        self.cache.activate_past_recording()
        self._pass(past)
        for _ in range(PRODUCTS_BEFORE_PACKING + 1):  # weights are packed, as after the first rounds of drafts
            self._pass(past[:, : TRANSPOSED_ROWS.start])
            drop_last(self.cache, min(self.past, TRANSPOSED_ROWS.start))
        return self.warm()

    def measure(self) -> float:
        """New tokens per second."""
        return self.ids.shape[1] * self.steps_per_second()

    def _step(self) -> None:
        count = self.ids.shape[1]
        if self.name == "drafting":
            self.draft(count)
            drop_last(self._shadow_cache(), count)
        else:
            self._pass(self.ids)
            drop_last(self.cache, count)

    def _shadow_cache(self) -> Cache:
        shadow = self.model.shadow.num_cache_layers
        return split_cache(self.cache, shadow, len(self.model.architecture.blocks_of(self.model.base)))[0]

    @torch.no_grad()
    def draft(self, count: int) -> Tensor:
        """Draft so many tokens (1, count) behind the first of the case's."""
        token, said = self.ids[:, :1], []
        for place in range(self.past, self.past + count):
            states = self.model.run_backbone(token, None, torch.full_like(token, place), self.cache)
            proposal = self.drafter.propose(list, states[:, -1])
            assert proposal is not None
            token = proposal.tokens[:, None]
            said.append(token)
        return torch.cat(said, 1)

    @torch.no_grad()
    def _pass(self, ids: Tensor) -> None:
        self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)


def open_subject(settings: PassesSettings, name: str) -> PassesSubject:
    """Load a subject of ``bench passes``."""
    return PassesSubject(settings, name)


PASSES = Bench(
    name="passes",
    help="a pass over a few tokens, and a draft of as many: tokens per second",
    unit="tokens_per_second",
    settings=PassesSettings,
    context=("model", "adapter", "device", "dtype", "past"),
    plan=plan,
    open=open_subject,
    examples="""examples:
  shadowtune bench passes --model tiny --tokens 1,4       a random base, to see how it works
  shadowtune bench passes --adapter runs/gsm8k/model
""",
)
