import pytest
import torch

from shadowtune.errors import UnsupportedArchitectureError
from shadowtune.serving.engine.masks import Masks
from tests.support.bases import tiny_base, tiny_config

POSITIONS = torch.tensor([[3, 4], [0, 1]])


def masks(model_type="llama", **settings):
    return Masks(tiny_base(model_type, **settings).config)


def visible(mask):
    return [[row.nonzero()[:, 0].tolist() for row in rows] for rows in mask[:, 0]]


def test_a_token_sees_what_stands_up_to_itself_in_its_own_row():
    mask = masks()(POSITIONS, 6, torch.float32)
    assert mask.shape == (2, 1, 2, 6)
    assert visible(mask) == [[[0, 1, 2, 3], [0, 1, 2, 3, 4]], [[0], [0, 1]]]


def test_a_window_ends_what_a_token_sees():
    assert visible(masks("mistral", sliding_window=2)(POSITIONS, 6, torch.float32)) == [[[2, 3], [3, 4]], [[0], [0, 1]]]


def test_layers_with_and_without_a_window_get_masks_of_their_own():
    both = masks("gemma3_text", sliding_window=2)(POSITIONS, 6, torch.float32)
    assert visible(both["full_attention"])[0] == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert visible(both["sliding_attention"])[0] == [[2, 3], [3, 4]]


def test_eager_attention_adds_the_mask():
    mask = masks("gemma2")(POSITIONS, 6, torch.bfloat16)["full_attention"]
    assert mask.dtype == torch.bfloat16
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}


@pytest.mark.parametrize(
    ("model_type", "settings", "said"),
    [
        ("qwen3_next", {}, "'qwen3_next' cannot be served in batches: its .* keep no keys by position"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"rotary positions \(dynamic\) change with the longest row",
        ),
        ("llama", {"attn_implementation": "flash_attention_2"}, "attention 'flash_attention_2' takes no mask"),
    ],
)
def test_what_makes_rows_depend_on_one_another_is_refused(model_type, settings, said):
    implementation = settings.pop("attn_implementation", "sdpa") if "attn_implementation" in settings else "sdpa"
    config = tiny_config(model_type, **settings)
    config._attn_implementation_internal = implementation
    with pytest.raises(UnsupportedArchitectureError, match=said):
        Masks(config)
