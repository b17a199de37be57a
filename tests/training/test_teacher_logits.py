import json
import re

import pytest
import torch
from safetensors.torch import load_file

from shadowtune.core.losses import TopTokens
from shadowtune.data.collate import CausalCollator
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.training import teacher_logits
from shadowtune.training.teacher_logits import TeacherLogitsDataset, examples_fingerprint
from tests.support.runs import causal_rows

K = 3
FACTS = {"base": "abc", "distillation_top_k": str(K)}


def labelled(row):
    return [position for position, label in enumerate(row["labels"][1:]) if label != -100]


def predictions(rows, seed=0):
    """Any K tokens for each labelled position of the rows."""
    shape = (sum(len(labelled(row)) for row in rows), K)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    return TopTokens(torch.randint(90, shape, generator=generator), torch.log_softmax(scores, -1))


@pytest.fixture
def rows(monkeypatch):
    """Eight rows of uneven length and uneven labels, three to a file."""
    monkeypatch.setattr(teacher_logits, "EXAMPLES_PER_FILE", 3)
    return causal_rows(8)


def filled(rows, directory):
    taught = TeacherLogitsDataset(rows, directory, FACTS)
    for first in taught.missing():
        taught.write(first, predictions(taught.examples_from(first), seed=first))
    return taught


def test_each_row_gets_what_was_predicted_for_it_where_the_next_token_is_labelled(rows, tmp_path):
    taught = filled(rows, tmp_path)
    assert len(taught) == 8
    by_row = []
    for first in (0, 3, 6):
        group = rows[first : first + 3]
        counts = [len(labelled(row)) for row in group]
        by_row += zip(*(part.split(counts) for part in predictions(group, seed=first)), strict=True)
    for row, one, (tokens, log_probabilities) in zip(rows, taught, by_row, strict=True):
        assert {name: one[name] for name in row} == row
        assert torch.equal(one["teacher_tokens"][labelled(row)], tokens)
        assert torch.equal(one["teacher_log_probabilities"][labelled(row)], log_probabilities)
        elsewhere = [position for position in range(len(row["labels"])) if position not in labelled(row)]
        assert not one["teacher_tokens"][elsewhere].any()
        assert len(one["teacher_tokens"]) == len(row["input_ids"])
    assert torch.equal(taught[-1]["teacher_tokens"], taught[7]["teacher_tokens"])


def test_rows_become_batches_in_any_order(rows, tmp_path):
    taught = filled(rows, tmp_path)
    batch = CausalCollator(0)([taught[index] for index in (6, 1)])
    assert batch["teacher_tokens"].dtype == torch.int64
    assert batch["teacher_tokens"].shape == (*batch["input_ids"].shape, K)
    assert torch.equal(batch["teacher_tokens"][1, : len(rows[1]["labels"])], taught[1]["teacher_tokens"])


def test_an_entry_takes_eight_bytes_and_a_file_says_what_it_was_made_of(rows, tmp_path):
    taught = filled(rows, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"rows-{first:08d}.safetensors" for first in (0, 3, 6)]
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert sum(tensor.nbytes for tensor in tensors) == taught.positions * K * 8
    size = int.from_bytes(files[0].read_bytes()[:8], "little")
    found = json.loads(files[0].read_bytes()[8 : 8 + size])["__metadata__"]
    assert found["base"] == "abc"
    assert found["rows"] == examples_fingerprint(rows)


def test_only_files_that_are_not_there_are_missing(rows, tmp_path):
    taught = TeacherLogitsDataset(rows, tmp_path / "new", FACTS)
    assert list(taught.missing()) == [0, 3, 6]
    taught.write(3, predictions(taught.examples_from(3)))
    assert list(taught.missing()) == [0, 6]
    assert list(TeacherLogitsDataset(rows, tmp_path / "new", FACTS).missing()) == [0, 6]


def test_files_of_another_run_are_refused_and_left_alone(rows, tmp_path):
    filled(rows, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for others, facts, message in (
        (rows, {**FACTS, "base": "xyz"}, "it has base abc and not xyz; name another directory, or delete this one"),
        (rows, {**FACTS, "distillation_top_k": "4"}, "it has distillation_top_k 3 and not 4;"),
        (rows[::-1], FACTS, f"it has rows {examples_fingerprint(rows)} and not {examples_fingerprint(rows[::-1])};"),
    ):
        with pytest.raises(ConfigError, match=f"^distillation_cache={tmp_path} was filled for .*{re.escape(message)}"):
            list(TeacherLogitsDataset(others, tmp_path, facts).missing())
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_files_of_another_length_are_refused(rows, tmp_path, monkeypatch):
    filled(rows, tmp_path)
    monkeypatch.setattr(teacher_logits, "EXAMPLES_PER_FILE", 4)
    with pytest.raises(ConfigError, match="it has rows_in_a_file 3 and not 4;"):
        list(TeacherLogitsDataset(rows, tmp_path, FACTS).missing())


def test_a_file_that_was_cut_off_is_named(rows, tmp_path):
    taught = filled(rows, tmp_path)
    file = tmp_path / "rows-00000003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=rf"^{file} is damaged .*; delete it, and it will be made anew$"):
        list(taught.missing())
    file.unlink()
    assert list(taught.missing()) == [3]


def test_a_directory_that_cannot_be_written_is_named(rows, tmp_path):
    (tmp_path / "taken").write_text("")
    taught = TeacherLogitsDataset(rows, tmp_path / "taken", FACTS)
    with pytest.raises(CheckpointError, match=f"^cannot write to {tmp_path / 'taken'}"):
        taught.write(0, predictions(taught.examples_from(0)))


def test_the_fingerprint_of_rows_sees_their_order_their_borders_and_their_labels():
    def row(ids, labels=None):
        return {"input_ids": ids, "labels": labels or ids}

    variants = [
        [row([1, 2, 3]), row([4, 5])],
        [row([4, 5]), row([1, 2, 3])],
        [row([1, 2]), row([3, 4, 5])],
        [row([1, 2, 3], [-100, 2, 3]), row([4, 5])],
        [row([1, 2, 3])],
    ]
    assert len({examples_fingerprint(rows) for rows in variants}) == len(variants)
