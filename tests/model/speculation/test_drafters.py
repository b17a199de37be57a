"""What the text itself proposes, beside a search written as its definition."""

import random

import pytest

from shadowtune.model.speculation.drafters import LONGEST_MATCH, SHORTEST_MATCH, NgramDrafter


def by_definition(text):
    """Compare every earlier place with the text's end, longest matches and latest places first."""
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                return text[start + length], length
    return None


@pytest.mark.parametrize("vocabulary", [2, 5, 50])
def test_the_latest_of_the_longest_matches_is_gone_on_from(vocabulary):
    draw = random.Random(vocabulary)
    texts = [[draw.randrange(vocabulary) for _ in range(draw.randrange(1, 40))] for _ in range(500)]
    found = 0
    for text in texts:
        proposal, expected = NgramDrafter().propose(lambda text=text: [text], None), by_definition(text)
        assert (proposal is None) == (expected is None), text
        if proposal is not None and expected is not None:
            found += 1
            token, length = expected
            assert proposal.tokens.tolist() == [token], text
            assert proposal.confidence.tolist() == pytest.approx([length / (length + 1)])
    assert found > 0


def test_the_largest_vocabularies_and_the_codes_of_surrogates_are_tokens_like_others():
    text = [0, 262_143, 55_296, 1_114_111, 7, 262_143, 55_296]
    proposal = NgramDrafter().propose(lambda: [text], None)
    assert proposal.tokens.tolist() == [1_114_111]


def test_rows_that_have_no_match_get_no_confidence():
    proposal = NgramDrafter().propose(lambda: [[1, 2, 3, 4], [5, 6, 7, 5, 6]], None)
    assert proposal.tokens.tolist() == [0, 7]
    assert proposal.confidence.tolist() == pytest.approx([0, 2 / 3])
