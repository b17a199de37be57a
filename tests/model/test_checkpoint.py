import json
import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadowtune.errors import CheckpointError
from shadowtune.model import checkpoint
from shadowtune.model.checkpoint import read_tensors, tensor_checksum, write_tensors
from shadowtune.model.files import INDEX, WEIGHTS, writing_into


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(30, 10, generator=generator),
        "b": torch.randn(40, 10, generator=generator).to(torch.bfloat16),
        "c": torch.randn(3, 2, generator=generator).T,
        "n": torch.tensor(5),
    }


def save(directory, tensors=None, config="{}", max_shard_size="5GB"):
    with writing_into(directory) as staging:
        write_tensors(staging, tensors or some_tensors(), max_shard_size)
        (staging / "config.json").write_text(config)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


@pytest.mark.parametrize("max_shard_size", ["5GB", 1000])
def test_tensors_come_back_with_their_values_and_dtypes(tmp_path, max_shard_size):
    save(tmp_path / "new" / "deep", max_shard_size=max_shard_size)
    assert same(read_tensors(str(tmp_path / "new" / "deep")), some_tensors())
    assert (tmp_path / "new" / "deep" / INDEX).exists() == (max_shard_size == 1000)
    assert not list((tmp_path / "new" / "deep").glob(".*"))


def test_names_of_release_0_1_0_are_read_as_those_of_today(tmp_path):
    old = {"shadow.draft_fusion.down.weight": torch.ones(2), "shadow.boundaries.draft_fusion.x": torch.zeros(1)}
    save(tmp_path, old)
    assert read_tensors(str(tmp_path)).keys() == {"shadow.draft_head.down.weight", "shadow.boundaries.draft_fusion.x"}


@pytest.mark.parametrize(("first", "second"), [(1000, "5GB"), ("5GB", 1000), (500, 1000)])
def test_a_new_save_replaces_the_old_one_however_both_were_sharded(tmp_path, first, second):
    save(tmp_path, some_tensors(0), max_shard_size=first)
    (tmp_path / "tokenizer.json").write_text("kept")
    save(tmp_path, some_tensors(1), max_shard_size=second)
    assert same(read_tensors(str(tmp_path)), some_tensors(1))
    fresh = tmp_path / "fresh"
    save(fresh, some_tensors(1), max_shard_size=second)
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} - {"tokenizer.json"} == {p.name for p in fresh.iterdir()}
    assert (tmp_path / "tokenizer.json").read_text() == "kept"


def test_files_of_other_kinds_leave_the_tensors_alone(tmp_path):
    save(tmp_path, max_shard_size=1000)
    with writing_into(tmp_path) as staging:
        (staging / "summary.json").write_text("{}")
        (staging / "config.json").write_text("{}")
    assert same(read_tensors(str(tmp_path)), some_tensors())


def test_saved_files_have_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    save(tmp_path)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def fail_on_disk_full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def fail_halfway(tensors, filename, metadata):
    save_file(dict(list(tensors.items())[:1]), filename, metadata)
    raise OSError(28, "No space left on device")


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("failure", "error"),
    [(fail_on_disk_full, CheckpointError), (fail_halfway, CheckpointError), (interrupt, KeyboardInterrupt)],
)
def test_an_interrupted_save_leaves_the_old_one_and_no_scraps(tmp_path, monkeypatch, failure, error):
    save(tmp_path, some_tensors(0), config='{"old": 1}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", failure)
    with pytest.raises(error) as caught:
        save(tmp_path, some_tensors(1), config='{"new": 1}')
    if error is CheckpointError:
        assert str(caught.value) == f"cannot write to {tmp_path}: No space left on device"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("survivors", [1, 2, 3])
def test_a_save_killed_while_files_move_is_never_read_as_a_mixture(tmp_path, monkeypatch, survivors):
    save(tmp_path, some_tensors(0), max_shard_size=1000)
    moved = []
    replace = os.replace

    def killed(source, target):
        if len(moved) == survivors:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, some_tensors(1), max_shard_size=1000)
    if survivors < 3:  # two shards, then the index
        with pytest.raises(CheckpointError, match=f"belongs to another save than {INDEX}"):
            read_tensors(str(tmp_path))
    else:
        assert same(read_tensors(str(tmp_path)), some_tensors(1))


def test_a_directory_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/x: Not a directory"):
        save(tmp_path / "file" / "x")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file: File exists"):
        save(tmp_path / "file")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def cut_the_header(path):
    path.write_bytes(path.read_bytes()[:20])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def make_foreign(path):
    save_file({"a": torch.ones(2)}, path)


def make_pickle(path):
    path.write_bytes(pickle.dumps(some_tensors()))


def rename_a_key(path):
    tensors = load_file(path)
    tensors["z"] = tensors.pop("a")
    save_file(tensors, path, {"sha256": tensor_checksum(some_tensors())})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "damaged or not a safetensors file"),
        (cut_the_header, "damaged or not a safetensors file"),
        (flip_a_bit, "do not match their checksum"),
        (empty, "damaged or not a safetensors file"),
        (make_foreign, "carries no checksum"),
        (make_pickle, "damaged or not a safetensors file"),
        (rename_a_key, "do not match their checksum"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, damage, message):
    save(tmp_path)
    damage(tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(str(tmp_path))
    assert str(tmp_path / WEIGHTS) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": {"a": "x"}}', '{"weight_map": [], "metadata": {}}']
)
def test_a_damaged_index_is_an_error_that_names_it(tmp_path, content):
    save(tmp_path, max_shard_size=1000)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        read_tensors(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path):
    save(tmp_path, max_shard_size=1000)
    name = json.loads((tmp_path / INDEX).read_text())["weight_map"]["b"]
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_tensors(str(tmp_path))


def test_missing_tensors_are_an_error_and_a_pickle_beside_them_is_never_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"has no {WEIGHTS}"):
        read_tensors(str(tmp_path))

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle"):
        read_tensors(str(tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_the_checksum_depends_on_names_and_every_byte_and_not_on_layout():
    tensors = some_tensors()
    assert tensor_checksum(tensors) == tensor_checksum(dict(reversed(tensors.items())))
    assert tensor_checksum(tensors) == tensor_checksum({**tensors, "c": tensors["c"].contiguous()})
    assert tensor_checksum(tensors) != tensor_checksum({**tensors, "n": torch.tensor(6)})
    assert tensor_checksum({"a": torch.ones(2)}) != tensor_checksum({"b": torch.ones(2)})
    assert tensor_checksum({"a": torch.zeros(2, 3)}) != tensor_checksum({"a": torch.zeros(3, 2)})
    assert tensor_checksum({"a": torch.zeros(2)}) != tensor_checksum({"a": torch.zeros(2, dtype=torch.int32)})
