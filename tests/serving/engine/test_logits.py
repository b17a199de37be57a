import torch

from shadowtune.serving.engine.logits import PLACES, Logits


def test_logits_are_made_in_blocks_where_they_are_looked_at():
    weight, states = torch.randn(11, 4), torch.randn(3 * PLACES, 4, dtype=torch.bfloat16)
    asked = []

    def head(part):
        asked.append(len(part))
        return part.float() @ weight.T

    logits = Logits(states, head)
    for place in (0, 1, PLACES - 1, 2 * PLACES + 5):  # the block between is never looked at
        values, likeliest = logits[place]
        torch.testing.assert_close(values, states[place].float() @ weight.T)
        assert likeliest == int(values.argmax())
        assert values.dtype == torch.float32
    assert asked == [PLACES, PLACES]
