"""What a request must be to get a row."""

import pytest

from shadowtune.serving.engine.adapters import Adapter
from shadowtune.serving.engine.intake import Intake
from shadowtune.serving.engine.limits import Limits
from shadowtune.serving.requests import RequestError, Sampling
from tests.serving.engine.support import Collected, adapter, request
from tests.support.bases import tiny_base
from tests.support.tokenizers import tiny_tokenizer

USER = [{"role": "user", "content": "tea"}]


def row(base=None, owner=None, limits=None, **settings):
    intake = Intake(base or tiny_base(), tiny_tokenizer(add_bos=True), limits or Limits())
    return intake.row(request(**settings), owner, Collected())


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
        ({"sampling": Sampling(logit_bias={97: 1.0})}, "logit_bias", "token 97"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_with_the_field(settings, param, said):
    with pytest.raises(RequestError, match=said) as raised:
        row(**settings)
    assert (raised.value.status, raised.value.param) == (400, param)


def test_texts_begin_as_the_tokenizer_begins_them_and_predictions_go_on():
    tokenizer = tiny_tokenizer()
    made = row(prompt="a tea", prediction="hot tea")
    assert made.tokens == [1, *tokenizer("a tea")["input_ids"]]
    assert made.prediction == tokenizer("hot tea")["input_ids"]


def test_messages_become_the_models_prompt():
    tokenizer = tiny_tokenizer()
    made = row(prompt=None, messages=USER)
    text = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False)
    assert tiny_tokenizer().decode(made.tokens) == text


def test_room_is_what_is_asked_for_or_all_there_is():
    assert row(max_tokens=7).room == 12
    assert row(max_tokens=1000, fitting=True).room == 128
    assert row(max_tokens=None).room == 128
    assert row(max_tokens=None, limits=Limits(max_model_len=40)).room == 40
    assert row(max_tokens=None, limits=Limits(max_tokens=30)).room == 30
    assert row(base=tiny_base("gpt2"), max_tokens=None).room == 128  # which calls its positions otherwise


def test_a_backbone_with_fewer_positions_bounds_its_own_model():
    base = tiny_base()
    model = adapter(base)
    model.shadow.backbone.config.max_position_embeddings = 50
    owner = Adapter("a", model, None, base, None)
    assert row(base, owner, max_tokens=None).room == 50
    assert row(base, None, max_tokens=None).room == 128
