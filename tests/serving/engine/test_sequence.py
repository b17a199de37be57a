"""Decoding of one request: predictions, seeds, stop strings, end tokens, logprobs."""

import dataclasses

import pytest
import torch

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.serving.engine.sequence import LOGITS_BLOCK, LazyLogits
from shadowtune.serving.requests import SamplingParams
from tests.model.speculation.test_sampling import chi_square
from tests.serving.engine.support import (
    adapter,
    alone,
    answers,
    ask,
    ask_all,
    engine,
    one_model,
    prompt,
    request,
    with_engine,
)
from tests.support.bases import tiny_base
from tests.support.tokenizers import tiny_tokenizer

WARM = SamplingParams(temperature=1.3, top_k=20, seed=5)


@pytest.fixture(scope="module")
def model():
    return one_model()["a"]


def one(model, asked, **limits):
    """Tokens, pieces and counters of one answer."""

    async def work(served):
        ids, pieces = await ask(served, asked)
        return ids, pieces, served.counters()

    return with_engine(engine({"a": model}, **limits), work)


def predictions(model):
    """Predictions of an answer of 12 tokens: the tokens, and how many of them stand."""
    said = alone(model, prompt(5), 20)
    wrong = [(token + 1) % 97 for token in said]
    return {
        "right": (said[:12], 12),
        "all but the last": (said[:11], 11),
        "wrong": (wrong[:12], 0),
        "right, then wrong": (said[:7] + wrong[7:12], 7),
        "longer than the answer": (said, 12),
        "empty": ([], 0),
    }


@pytest.mark.parametrize("case", ["right", "all but the last", "wrong", "right, then wrong", "longer than the answer"])
@pytest.mark.parametrize("limit", [512, 2], ids=["whole", "chunks"])
def test_a_prediction_saves_passes_and_changes_nothing(model, case, limit):
    predicted, stands = predictions(model)[case]
    asked = request(prediction=predicted)
    ids, pieces, counters = one(model, asked, speculation=None, prefill_tokens=limit)
    assert ids == alone(model, prompt(5))
    usage = pieces[-1].usage
    assert (usage.accepted_prediction_tokens, usage.rejected_prediction_tokens) == (stands, len(predicted) - stands)
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 12)
    reading = -(-5 // limit)
    assert counters["passes"] == reading + max(0, 12 - stands - 1)
    assert counters["prompt_tokens"] == 5


def test_a_fully_accepted_prediction_takes_one_pass(model):
    said = alone(model, prompt(5), 20)
    end = next(place for place in range(4, 20) if said[place] not in said[:place])
    model.generation_config.eos_token_id = said[end]
    try:
        for predicted in (said[:end], said[: end + 1], said):
            asked = request(prediction=predicted, max_tokens=40, ignore_eos=False)
            ids, pieces, counters = one(model, asked)
            assert (ids, pieces[-1].finish_reason, counters["passes"]) == (said[:end], "stop", 1)
            assert pieces[-1].usage.completion_tokens == end + 1
            assert pieces[-1].usage.accepted_prediction_tokens == min(len(predicted), end + 1)
    finally:
        model.generation_config.eos_token_id = 2


def test_predictions_may_be_text_and_share_a_batch(model):
    said = alone(model, prompt(9), 12)
    text = tiny_tokenizer().decode(said)
    requests = [request(length=9, prediction=text), request(length=8, prediction=said), request(length=7)]
    assert answers(engine({"a": model}), requests) == [said, alone(model, prompt(8)), alone(model, prompt(7))]


@pytest.mark.parametrize("speculation", [None, SpeculationConfig(length=3)], ids=["plain", "drafts"])
def test_a_seed_fixes_the_samples_whatever_else_is_in_the_batch(model, speculation):
    asked = request(sampling=WARM)
    told = answers(engine({"a": model}, speculation=None), [asked])[0]
    other = dataclasses.replace(asked, sampling=dataclasses.replace(WARM, seed=6))
    requests = [other, request(length=9), asked, request(length=3, max_tokens=2), dataclasses.replace(asked)]
    batch = answers(engine({"a": model}, speculation=speculation), requests)
    assert batch[2] == batch[4] == told
    assert batch[0] != told
    assert answers(engine({"a": model}), [request(sampling=WARM, prediction=[*told[:8], 3, 3])])[0] == told


def test_samples_without_a_seed_differ(model):
    asked = request(sampling=SamplingParams(temperature=2.0))
    first, second = answers(engine({"a": model}), [asked, asked])
    assert first != second


@pytest.mark.parametrize(
    "settings",
    [
        {"speculation": SpeculationConfig(length=2, drafter="shadow")},
        {"speculation": SpeculationConfig()},
        {"prediction": True, "speculation": None},
    ],
    ids=["drafts", "auto", "predictions"],
)
def test_samples_follow_the_models_distribution(settings):
    """Answers of two tokens over a vocabulary of 12, against the model's own probabilities of them."""
    model = adapter(tiny_base(vocab_size=12))
    sampling = SamplingParams(temperature=1.5, top_k=4)
    predicted = alone(model, [3, 4, 5], 2) if settings.pop("prediction", False) else None
    asked = request(prompt=[3, 4, 5], max_tokens=2, sampling=sampling, prediction=predicted)
    draws = 1500
    served = engine({"a": model}, max_sequences=64, max_queue=draws, **settings)
    told = [tuple(ids) for ids in with_engine(served, lambda each: ask_all(each, [asked] * draws))]
    exact: dict[tuple[int, ...], float] = {}
    for first, chance in _distribution(model, [3, 4, 5]):
        for second, further in _distribution(model, [3, 4, 5, first]):
            exact[first, second] = chance * further
    names = sorted(exact)
    assert set(told) <= set(names), "an impossible answer was drawn"
    counts = torch.tensor([told.count(name) for name in names], dtype=torch.float64)
    statistic, limit = chi_square(counts, torch.tensor([exact[name] for name in names], dtype=torch.float64))
    assert statistic < limit


@torch.no_grad()
def _distribution(model, ids):
    values, tokens = (model(torch.tensor([ids])).logits[0, -1].double() / 1.5).topk(4)
    return list(zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True))


def test_penalties_count_the_output_and_drafts_change_nothing(model):
    sampling = SamplingParams(temperature=0, presence_penalty=2.0, frequency_penalty=1.0, repetition_penalty=1.2)
    asked = request(sampling=sampling, max_tokens=20)
    plain = answers(engine({"a": model}, speculation=None), [asked])[0]
    assert plain != alone(model, prompt(5), 20)
    for speculation in (SpeculationConfig(length=3), SpeculationConfig(length=3, drafter="ngram")):
        assert answers(engine({"a": model}, speculation=speculation), [asked])[0] == plain


def test_a_bias_can_forbid_and_force(model):
    said = alone(model, prompt(5))
    forbidden = request(sampling=SamplingParams(temperature=0, logit_bias={said[0]: -100.0}))
    forced = request(sampling=SamplingParams(temperature=0, logit_bias={50: 1000.0}))
    without, only = answers(engine({"a": model}), [forbidden, forced])
    assert said[0] not in without
    assert only == [50] * 12


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(model):
    text = tiny_tokenizer().decode(alone(model, prompt(5), 40))
    stop = text[6:9]
    for speculation in (None, SpeculationConfig(length=4)):
        _, pieces, counters = one(model, request(max_tokens=40, stop=(stop,)), speculation=speculation)
        assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
        assert pieces[-1].finish_reason == "stop"
        assert pieces[-1].usage.completion_tokens < 40
        assert counters["running"] == 0


def test_pieces_come_one_by_one_and_make_the_text(model):
    _, pieces, _ = one(model, request(top_logprobs=None), speculation=None)
    assert "".join(piece.text for piece in pieces) == tiny_tokenizer().decode(alone(model, prompt(5)))
    assert len(pieces) > 6
    assert all(piece.tokens == () for piece in pieces)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert [piece.usage is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]


def test_an_end_token_ends_the_answer_unless_it_is_ignored(model):
    said = alone(model, prompt(5), 12)
    place = next(place for place in range(2, 12) if said[place] not in said[:place])
    model.generation_config.eos_token_id = [said[place], 2]
    try:
        ended, ignored = answers(engine({"a": model}), [request(ignore_eos=False), request()])
    finally:
        model.generation_config.eos_token_id = 2
    assert ended == said[:place]
    assert ignored == said


def test_logprobs_are_those_of_the_model_before_any_sampling(model):
    asked = request(top_logprobs=3, sampling=WARM, max_tokens=4)
    ids, pieces, _ = one(model, asked)
    told = [token for piece in pieces for token in piece.tokens]
    with torch.no_grad():
        logits = model(torch.tensor([prompt(5) + ids])).logits[0, 4:-1].log_softmax(-1)
    for token, true in zip(told, logits, strict=True):
        assert abs(token.logprob - float(true[token.id])) < 1e-4
        assert [other for other, _, _ in token.top] == true.topk(3).indices.tolist()
        assert token.text == tiny_tokenizer().decode([token.id])


def test_logits_are_made_in_blocks_where_they_are_looked_at():
    weight, states = torch.randn(11, 4), torch.randn(3 * LOGITS_BLOCK, 4, dtype=torch.bfloat16)
    asked = []

    def head(part):
        asked.append(len(part))
        return part.float() @ weight.T

    logits = LazyLogits(states, head)
    for place in (0, 1, LOGITS_BLOCK - 1, 2 * LOGITS_BLOCK + 5):  # the block between is never looked at
        values, likeliest = logits[place]
        torch.testing.assert_close(values, states[place].float() @ weight.T)
        assert likeliest == int(values.argmax())
        assert values.dtype == torch.float32
    assert asked == [LOGITS_BLOCK, LOGITS_BLOCK]
