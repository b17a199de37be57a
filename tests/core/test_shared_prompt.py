"""The end of the shared prompt, found in tensors, against a search in lists."""

import random

import pytest
import torch

from shadowtune.core.shared_prompt import injected_tokens, shared_prompt_length, shared_prompt_lengths

MARKERS = [(1,), (1, 2), (1, 1), (2, 1, 2)]


def texts(seed, count=6):
    """Sequences of few different tokens, so that the marker is in some of them, in some several times."""
    draw = random.Random(seed)
    return [[draw.randint(0, 3) for _ in range(draw.randint(1, 12))] for _ in range(count)]


def padded(rows, left, pad):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, where], mask[index, where] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("left", [False, True])
def test_padded_batches(marker, left):
    found = 0
    for seed in range(30):
        rows = texts(seed)
        ids, mask = padded(rows, left, pad=1)  # padding looks like the marker
        expected = [shared_prompt_length(row, marker) for row in rows]
        found += sum(map(bool, expected))
        assert shared_prompt_lengths(ids, marker, mask).tolist() == expected
        injected = injected_tokens(ids, marker, mask, None)
        for index, row in enumerate(rows):
            assert injected[index][mask[index].bool()].tolist() == [at >= expected[index] for at in range(len(row))]
    assert found > 10


@pytest.mark.parametrize("marker", MARKERS)
def test_sequences_packed_into_one_row_have_their_own(marker):
    for seed in range(30):
        rows = texts(seed)
        ids = torch.tensor([[token for row in rows for token in row]])
        positions = torch.tensor([[at for row in rows for at in range(len(row))]])
        expected = [at >= shared_prompt_length(row, marker) for row in rows for at in range(len(row))]
        assert injected_tokens(ids, marker, None, positions)[0].tolist() == expected


def test_the_first_occurrence_ends_it_and_without_a_marker_nothing_is_shared():
    assert shared_prompt_length([5, 1, 2, 7, 1, 2, 8], (1, 2)) == 3
    assert shared_prompt_length([5, 1, 2], None) == 0
    assert shared_prompt_length([5], (1, 2)) == 0
