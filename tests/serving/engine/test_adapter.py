import torch

from shadowtune.data.generation import configured_ends
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.serving.engine.adapter import Adapter, max_positions, pad_right
from tests.serving.engine.support import adapter, prompt
from tests.support.bases import tiny_base, tiny_config


class Line:
    def __init__(self, cached, max_length=100):
        self.cached, self.max_length = cached, max_length


@torch.no_grad()
def test_the_backbone_runs_ahead_and_back_again():
    base = tiny_base()
    one = Adapter("a", adapter(base), PromptFormat(), base, None)
    texts, rows = [prompt(12), prompt(9)], [Line(0), Line(0)]
    for row in rows:
        one.cache.add(row)
    one.initial_states(rows, [texts[0][:4], texts[1][:2]])
    rows[0].cached, rows[1].cached = 4, 2
    one.initial_states(rows, [[5, 6], [7, 8]])  # drafts that do not stand
    ahead = one.initial_states(rows, [texts[0][4:6], texts[1][2:4]])
    later = one.initial_states(rows, [texts[0][6:7], texts[1][4:5]], seen=2)
    for place, (text, end) in enumerate(zip(texts, (7, 5), strict=True)):
        ids = torch.tensor([text[:end]])
        true = one.model.shadow.initial_states(ids, base.get_input_embeddings()(ids))[0, -3:]
        torch.testing.assert_close(torch.cat([ahead, later], 1)[place], true, rtol=1e-4, atol=1e-5)


def test_ends_are_one_token_several_or_none():
    config = tiny_base().generation_config
    for value, ends in ((2, {2}), ([2, 5], {2, 5}), (None, set())):
        config.eos_token_id = value
        assert set(configured_ends(config)) == ends
    assert set(configured_ends(None)) == set()


def test_positions_are_known_by_whatever_name():
    assert max_positions(tiny_config("llama")) == 128
    assert max_positions(tiny_config("gpt2")) == 128


def test_tokens_are_padded_behind():
    assert pad_right([[1, 2, 3], [4]], torch.device("cpu")).tolist() == [[1, 2, 3], [4, 0, 0]]
