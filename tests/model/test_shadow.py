import pytest
import torch

from shadowtune import ShadowConfig
from shadowtune.model.backbone import mirror_config
from shadowtune.model.shadow import Shadow
from tests.support.bases import tiny_base, tiny_config
from tests.support.shadows import perturbed_model, tokens


def made(**settings):
    torch.manual_seed(0)
    config = ShadowConfig(**{"rank": 4, "update_width": 3, **settings})
    return Shadow(config, tiny_config(), mirror_config(tiny_config(), config)).eval()


def test_equal_widths_need_no_projection_and_others_get_two():
    same, narrow = made(), made(hidden_size=16)
    assert not list(same.projection.parameters()) + list(same.input_projection.parameters())
    assert narrow.projection.weight.shape == (32, 16)
    assert narrow.input_projection.weight.shape == (16, 32)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 3),
        ({"inject_first": True}, 4),
        ({"injection_start": 0.1}, 3),
        ({"injection_start": 0.5}, 2),
        ({"injection_start": 0.5, "inject_first": True}, 2),
        ({"injection_start": 0.99}, 1),
    ],
    ids=str,
)
def test_boundaries_are_as_many_as_the_blocks_from_the_first_injection_on(settings, count):
    boundaries = made(**settings).boundaries
    assert boundaries.count == count
    assert boundaries.first == 4 - count


@torch.no_grad()
def test_the_state_begins_with_the_projected_backbone():
    shadow = made(hidden_size=16)
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    state = shadow.begin(None, embeds)
    hidden = shadow.backbone(inputs_embeds=embeds @ shadow.input_projection.weight.T).last_hidden_state
    torch.testing.assert_close(state.initial, hidden @ shadow.projection.weight.T)
    assert state.value is state.initial
    assert state.boundaries is shadow.boundaries


def test_every_call_has_a_state_of_its_own():
    shadow, embeds = made(), torch.zeros(1, 2, 32)
    assert shadow.begin(None, embeds) is not shadow.begin(None, embeds)
    assert not any(isinstance(value, torch.Tensor) for value in vars(shadow).values())


@pytest.mark.parametrize("layers", [1, 3])
def test_its_cache_needs_a_layer_for_each_block(layers):
    assert made(num_shadow_layers=layers).num_cache_layers == layers


def test_parameters_add_up_to_the_papers_count():
    base, config = tiny_base(), ShadowConfig(rank=4, update_width=3, intermediate_size=20)
    shadow = Shadow(config, base.config, mirror_config(base.config, config))
    d, heads, kv_heads, head, inner, blocks = 32, 4, 2, 8, 20, 4
    backbone = 2 * d * heads * head + 2 * d * kv_heads * head + 3 * d * inner + 2 * d + d
    boundaries = (blocks - 1) * 2 * d * 4 + (blocks - 2) * 4 * d * 3 + 2 * d  # no update after the last block
    assert sum(p.numel() for p in shadow.parameters()) == backbone + boundaries


@torch.no_grad()
def test_padding_and_positions_reach_the_backbone():
    shadow, base = perturbed_model().shadow, tiny_base()
    embeds = base.get_input_embeddings()(tokens(1, 6))
    alone = shadow.begin(None, embeds[:, 2:]).initial
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    together = shadow.begin(None, embeds, mask, torch.tensor([[0, 0, 0, 1, 2, 3]])).initial
    torch.testing.assert_close(together[:, 2:], alone, rtol=0, atol=1e-6)
    assert (shadow.begin(None, embeds).initial[:, 2:] - alone).abs().max() > 1e-3
