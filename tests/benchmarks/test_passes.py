import pytest
import torch

from benchmarks.speculation import PASSES_BASELINES, PassesCandidate, PassesSettings, plan_passes
from shadowtune.core.prepacked_linear import PrepackedForward
from shadowtune.errors import ConfigError

SMALL = {"model": "tiny", "past": 7, "tokens": (1, 5), "repeats": 1, "warm_up": 0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("benchmarks.measurement.TimedCandidate.sample_seconds", 0.0)


def candidate(name, **settings):
    return PassesCandidate(PassesSettings(**{**SMALL, **settings}), name)


def lengths(one):
    return [layer.get_seq_length() for layer in one.cache.layers]


@pytest.mark.parametrize("name", ["attached", *PASSES_BASELINES])
def test_every_candidate_passes_and_leaves_the_cache_as_it_was(name):
    one = candidate(name)
    for count in (1, 5):
        assert one.prepare({"tokens": count}) >= 0
        before = lengths(one)
        assert set(before) == {7}
        assert one.measure() > 0
        assert lengths(one) == before


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")
@pytest.mark.parametrize(("name", "prepacked"), [("attached", True), ("base", True), ("as-usual", False)])
def test_products_of_small_batches_are_prepacked_for_all_but_one(name, prepacked, monkeypatch):
    one, seen = candidate(name), []
    one.prepare({"tokens": 5})
    forward = PrepackedForward.__call__
    monkeypatch.setattr(PrepackedForward, "__call__", lambda layer, x: seen.append(layer) or forward(layer, x))
    one.measure()
    assert bool(seen) == prepacked


@torch.no_grad()
def test_the_draft_is_what_the_detached_shadow_says():
    one = candidate("drafting")
    one.prepare({"tokens": 5})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, one.model.config.vocab_size, (1, 12), generator=generator)[:, :8]
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    said = one.model.set_mode("detached").generate(ids, max_new_tokens=5, **options)
    assert torch.equal(one.draft(5), said[:, 8:])


def test_a_case_for_each_number_of_tokens():
    made = plan_passes(PassesSettings(**SMALL, baselines=("base",)))
    assert list(made.candidates) == ["attached", "base"]
    assert [case.values for case in made.cases] == [{"tokens": 1}, {"tokens": 5}]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"baselines": ("bass",)}, "unknown baseline 'bass'.*base"),
        ({"baselines": ()}, "--baselines must name some"),
        ({"past": 10**6}, "length 1000005 exceeds"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        plan_passes(PassesSettings(**{**SMALL, **settings}))


@pytest.mark.parametrize("tokens", [(), (0,)])
def test_tokens_are_numbers_of_at_least_one(tokens):
    with pytest.raises(ConfigError, match="tokens must be numbers of at least 1"):
        PassesSettings(**{**SMALL, "tokens": tokens})
