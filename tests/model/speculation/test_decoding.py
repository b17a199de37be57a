"""Speculative decoding against plain decoding, which is the slow and obvious way."""

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from shadowtune.compatibility import CACHE, cache_of
from shadowtune.config.shadow import SpeculationConfig
from shadowtune.errors import ConfigError
from shadowtune.model.speculation import decoding
from shadowtune.model.speculation.verification import Proposal
from tests.support.shadows import perturbed_model, tokens

DRAFTERS = ("shadow", "ngram", "combined")
NEW = 24


def left_padded(rows=3, length=9):
    """Prompts of different lengths, padded on the left."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        ids[row, : 2 * row] = 0
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def one(length=9):
    ids = tokens(1, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Oracle:
    """Proposes what the model will say, and something else at every ``wrong``-th token; it knows nothing of s0."""

    reads_states = False

    def __init__(self, answers, prompt, wrong):
        self.answers, self.prompt, self.wrong, self.asked = answers, prompt, wrong, 0

    def propose(self, texts, states):
        rows = texts()
        self.asked += 1
        tokens = []
        for row, text in enumerate(rows):
            at = min(len(text), self.answers.shape[1] - 1)
            right = int(self.answers[row, at])
            tokens.append((right + 1) % 97 if (at + row) % self.wrong == 0 else right)
        return Proposal(torch.tensor(tokens), torch.full((len(rows),), 0.9))

    def learn(self, hidden_states):
        pass


def with_oracle(monkeypatch, answers, prompt, wrong):
    oracle = Oracle(answers, prompt, wrong)
    monkeypatch.setattr(decoding, "make_drafter", lambda *arguments: oracle)
    return oracle


@pytest.fixture
def passes(monkeypatch):
    """Counts passes of the base and the tokens that the shadow's backbone sees."""
    counts = {"passes": 0, "backbone": 0}

    def watch(model):
        decoder, backbone = model.get_decoder(), model.shadow.backbone
        decoder.register_forward_pre_hook(lambda *_: counts.update(passes=counts["passes"] + 1))
        backbone.register_forward_pre_hook(
            lambda module, args, kwargs: counts.update(backbone=counts["backbone"] + kwargs["inputs_embeds"].shape[1]),
            with_kwargs=True,
        )
        return counts

    return watch


TREES = [SpeculationConfig(length=3, branches=4), SpeculationConfig(length=2, branches=2, drafter="shadow")]


@pytest.mark.parametrize(
    "speculate", [True, 1, 4, *(SpeculationConfig(length=3, drafter=name) for name in DRAFTERS), *TREES]
)
@pytest.mark.parametrize("inputs", [one(), left_padded()], ids=["one", "padded"])
@pytest.mark.parametrize("settings", [{}, {"variant": "stateless", "alpha": 0.003}], ids=["paper", "stateless"])
def test_greedy_says_the_same(speculate, inputs, settings):
    model = perturbed_model(**settings)
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    fast = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, speculate=speculate)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("speculate", [True, SpeculationConfig(branches=3, length=3)], ids=["chain", "tree"])
def test_a_thousand_prompts_are_answered_as_without_drafts(speculate):
    model, differing = perturbed_model(), 0
    for seed in range(10):
        ids, mask = tokens(100, 10, seed), torch.ones(100, 10, dtype=torch.long)
        for row in range(100):  # lengths from 3 to 10
            mask[row, : row % 8] = 0
        settings = {"input_ids": ids * mask, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        drafted, plain = model.generate(**settings, speculate=speculate), model.generate(**settings)
        differing += int((drafted != plain).any(1).sum())
    assert differing == 0


@pytest.mark.parametrize("wrong", [2, 3, 5, 1000])
@pytest.mark.parametrize("inputs", [one(), left_padded()], ids=["one", "padded"])
def test_rows_that_accept_different_lengths_say_the_same(wrong, inputs, monkeypatch, passes):
    model = perturbed_model()
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    counts = passes(model)
    with_oracle(monkeypatch, plain, 9, wrong)
    fast = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, speculate=4)
    assert torch.equal(plain, fast)
    if wrong == 1000:  # 1 token from the prompt, then 5 a pass
        assert counts["passes"] == 1 + -(-(NEW - 1) // 5)
    assert counts["passes"] < NEW


def test_the_backbone_sees_no_token_twice(monkeypatch, passes):
    model = perturbed_model()
    plain = model.generate(**one(), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    counts = passes(model)
    with_oracle(monkeypatch, plain, 9, wrong=1000)
    model.generate(**one(), max_new_tokens=NEW, do_sample=False, eos_token_id=None, speculate=4)
    assert counts["backbone"] == 9 + NEW - 1  # the last token goes into no network


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "gpt_oss"]
)
def test_every_architecture_says_the_same(model_type, monkeypatch):
    """Sliding windows included: 9 + 24 tokens are more than two of them."""
    model, inputs = perturbed_model(model_type), left_padded()
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    with_oracle(monkeypatch, plain, 9, wrong=3)
    assert torch.equal(plain, model.generate(**inputs, max_new_tokens=NEW, do_sample=False, speculate=4))


def test_a_cache_that_cannot_take_tokens_back_decodes_plainly_and_says_so():
    model = perturbed_model("qwen3_next")
    plain = model.generate(**one(), max_new_tokens=6, do_sample=False)
    with pytest.warns(UserWarning, match="without speculation: a cache of .* cannot take tokens back"):
        assert torch.equal(plain, model.generate(**one(), max_new_tokens=6, do_sample=False, speculate=True))


@pytest.mark.parametrize("inputs", [one(), left_padded()], ids=["one", "padded"])
def test_a_static_cache_says_the_same(inputs, monkeypatch):
    model = perturbed_model()
    settings = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(**inputs, **settings)
    with_oracle(monkeypatch, plain, 9, wrong=3)
    assert torch.equal(plain, model.generate(**inputs, **settings, speculate=4))


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 10},
        {"bad_words_ids": [[5], [7, 8]]},
        {"suppress_tokens": [4, 9, 11]},
        {"forced_eos_token_id": 2},
        {"prefix_allowed_tokens_fn": lambda row, text: range(3 + row, 60, 1 + len(text) % 2)},
        {"exponential_decay_length_penalty": (3, 1.4)},
    ],
    ids=lambda value: next(iter(value)),
)
def test_processors_are_asked_about_each_draft(settings, monkeypatch):
    model, inputs = perturbed_model(), left_padded()
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **settings)
    with_oracle(monkeypatch, plain, 9, wrong=3)
    assert torch.equal(plain, model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **settings, speculate=4))


class Thrice(StoppingCriteria):
    """Ends a row whose last three tokens are all odd."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -3:] % 2 == 1).all(1)


def test_a_row_ends_where_plain_decoding_ends_it(monkeypatch):
    model, inputs = perturbed_model(), left_padded(4, 12)
    free = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    ends = [int(free[0, 15]), int(free[1, 18])]  # so that rows end at different places, within accepted drafts
    for settings in ({"eos_token_id": ends}, {"stopping_criteria": StoppingCriteriaList([Thrice()])}):
        plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **settings)
        assert plain.shape != free.shape or not torch.equal(plain, free)
        with_oracle(monkeypatch, plain, 12, wrong=4)
        fast = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **settings, speculate=5)
        assert torch.equal(plain, fast)


def test_the_cache_that_comes_back_is_that_of_plain_decoding(monkeypatch):
    model, inputs = perturbed_model(), left_padded()
    settings = {"max_new_tokens": 11, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **settings)
    with_oracle(monkeypatch, plain.sequences, 9, wrong=3)
    fast = model.generate(**inputs, **settings, speculate=4)
    assert torch.equal(plain.sequences, fast.sequences)
    for ours, theirs in zip(cache_of(fast).layers, cache_of(plain).layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-4)


def test_a_conversation_goes_on_with_the_cache_of_the_last_answer():
    model = perturbed_model()
    first = one()
    answers = {}
    for speculate in (False, 3):
        cache = DynamicCache(config=model.config)
        said = model.generate(**first, max_new_tokens=8, do_sample=False, **{CACHE: cache}, speculate=speculate)
        more = torch.cat([said, tokens(1, 4, seed=5)], 1)
        mask = torch.ones_like(more)
        answers[speculate] = model.generate(
            input_ids=more,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            speculate=speculate,
            **{CACHE: cache},
        )
    assert torch.equal(answers[False], answers[3])


class Collector:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streaming_hands_on_each_token(monkeypatch):
    model, inputs = perturbed_model(), one()
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    with_oracle(monkeypatch, plain, 9, wrong=4)
    collector = Collector()
    model.generate(**inputs, max_new_tokens=NEW, do_sample=False, streamer=collector, speculate=4)
    assert collector.ended
    assert collector.pieces == [plain[0, :9].tolist(), *([token] for token in plain[0, 9:].tolist())]


def test_beams_decode_plainly_and_say_so():
    model = perturbed_model()
    plain = model.generate(**one(), max_new_tokens=6, num_beams=3, do_sample=False)
    with pytest.warns(UserWarning, match="without speculation: beam search is not token by token"):
        assert torch.equal(plain, model.generate(**one(), max_new_tokens=6, num_beams=3, do_sample=False, speculate=2))


class Counting(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_cache": False}, "there is no cache"),
        ({"logits_processor": LogitsProcessorList([Counting()])}, "Counting may keep a state"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores are recorded"),
    ],
)
def test_what_drafts_would_disturb_is_decoded_plainly(settings, reason):
    model = perturbed_model()
    with pytest.warns(UserWarning, match=reason):
        model.generate(**one(), max_new_tokens=3, do_sample=False, speculate=2, **settings)


def test_what_does_not_go_together_is_refused():
    model = perturbed_model()
    with pytest.raises(ConfigError, match="speculate=True does not go with assistant_model"):
        model.generate(**one(), assistant_model=model.detached(), speculate=True)
    with pytest.raises(ConfigError, match="speculate=2 does not go with mode 'detached'"):
        model.set_mode("detached").generate(**one(), speculate=2)
    with pytest.raises(ConfigError, match='True, False, "auto" or a number'):
        model.set_mode("attached").generate(**one(), speculate="sometimes")


def test_transformers_own_assisted_generation_takes_the_detached_model():
    model = perturbed_model()
    plain = model.generate(**one(), max_new_tokens=NEW, do_sample=False)
    assisted = model.generate(**one(), max_new_tokens=NEW, do_sample=False, assistant_model=model.detached())
    assert torch.equal(plain, assisted)


class CompiledEverywhere(CompileConfig):
    """Compiles on a processor too; without a back end's code, which would take minutes."""

    _compile_all_devices = True

    def __init__(self):
        super().__init__(backend="eager")


def test_a_compiled_verification_says_the_same(monkeypatch):
    model, inputs = perturbed_model(), one()
    settings = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(**inputs, **settings)
    with_oracle(monkeypatch, plain, 9, wrong=3)
    compiled = []
    compile_call = type(model).get_compiled_call

    def watched(self, config):
        compiled.append(config)
        return compile_call(self, config)

    monkeypatch.setattr(type(model), "get_compiled_call", watched)
    fast = model.generate(**inputs, **settings, speculate=4, compile_config=CompiledEverywhere())
    assert len(compiled) == 1
    assert torch.equal(plain, fast)
