"""Validation and tokenization of requests."""

import pytest

from shadowtune.serving.engine.adapter import Adapter
from shadowtune.serving.engine.request_processor import RequestProcessor
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.requests import RequestError, SamplingParams
from tests.serving.engine.support import Collected, adapter, request
from tests.support.bases import tiny_base
from tests.support.tokenizers import tiny_tokenizer

USER = [{"role": "user", "content": "tea"}]


def sequence(base=None, owner=None, limits=None, **settings):
    processor = RequestProcessor(base or tiny_base(), tiny_tokenizer(add_bos=True), limits or Limits())
    return processor.sequence(request(**settings), owner, Collected())


@pytest.mark.parametrize(
    ("settings", "param", "said"),
    [
        ({"prompt": None}, "messages", "exactly one of messages and prompt"),
        ({"messages": USER}, "messages", "exactly one of messages and prompt"),
        ({"prompt": []}, "prompt", "the prompt is empty"),
        ({"prompt": [-1]}, "prompt", "token -1, but ids go from 0 to 96"),
        ({"prompt": None, "messages": []}, "messages", "no messages"),
        ({"prompt": None, "messages": [{"role": "user"}]}, "messages", "has no text"),
        ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        ({"prediction": [97]}, "prediction", "token 97"),
        ({"sampling": SamplingParams(logit_bias={97: 1.0})}, "logit_bias", "token 97"),
    ],
    ids=str,
)
def test_invalid_requests_name_the_field(settings, param, said):
    with pytest.raises(RequestError, match=said) as raised:
        sequence(**settings)
    assert (raised.value.status, raised.value.param) == (400, param)


def test_texts_begin_as_the_tokenizer_begins_them_and_predictions_go_on():
    tokenizer = tiny_tokenizer()
    made = sequence(prompt="a tea", prediction="hot tea")
    assert made.tokens == [1, *tokenizer("a tea")["input_ids"]]
    assert made.prediction == tokenizer("hot tea")["input_ids"]


def test_messages_become_the_models_prompt():
    tokenizer = tiny_tokenizer()
    made = sequence(prompt=None, messages=USER)
    text = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False)
    assert tiny_tokenizer().decode(made.tokens) == text


def test_room_is_what_is_asked_for_or_all_there_is():
    assert sequence(max_tokens=7).max_length == 12
    assert sequence(max_tokens=1000, clamp_max_tokens=True).max_length == 128
    assert sequence(max_tokens=None).max_length == 128
    assert sequence(max_tokens=None, limits=Limits(max_model_len=40)).max_length == 40
    assert sequence(max_tokens=None, limits=Limits(max_tokens=30)).max_length == 30
    assert sequence(base=tiny_base("gpt2"), max_tokens=None).max_length == 128  # which calls its positions otherwise


def test_a_backbone_with_fewer_positions_bounds_its_own_model():
    base = tiny_base()
    model = adapter(base)
    model.shadow.backbone.config.max_position_embeddings = 50
    owner = Adapter("a", model, None, base, None)
    assert sequence(base, owner, max_tokens=None).max_length == 50
    assert sequence(base, None, max_tokens=None).max_length == 128
