import resource
import signal

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from shadowtune.errors import CheckpointError
from shadowtune.training.checkpoints import (
    TrainingProgress,
    atomic_directory,
    check_checkpoint,
    read_progress,
    write_progress,
)
from tests.support.runs import arguments, causal_rows, trainer_of
from tests.support.shadows import perturbed_model


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def fill(directory, text):
    (directory / "inner").mkdir()
    (directory / "inner" / "file").write_text(text)


def test_a_directory_appears_when_it_is_whole(accelerator, tmp_path):
    with atomic_directory(tmp_path / "target", accelerator, tmp_path / "checkpoints") as staging:
        fill(staging, "new")
        assert not (tmp_path / "target").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "inner" / "file").read_text() == "new"


def test_the_old_directory_is_replaced_as_a_whole(accelerator, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "stale").write_text("old")
    with atomic_directory(tmp_path / "target", accelerator, tmp_path / "checkpoints") as staging:
        fill(staging, "new")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["inner"]


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 1"), "is the disk full"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
    ],
    ids=["python", "torch", "tokenizers", "safetensors"],
)
def test_after_a_failure_the_old_directory_is_what_it_was_and_the_space_is_free_again(
    error, words, accelerator, tmp_path
):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").write_text("old")
    with (  # noqa: PT012 - the block is what fails
        pytest.raises(CheckpointError, match=rf"cannot write .*target: .*{words}.*; no checkpoint was saved before"),
        atomic_directory(tmp_path / "target", accelerator, tmp_path / "checkpoints") as staging,
    ):
        fill(staging, "new")
        raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "kept"]


def test_other_errors_are_not_taken_for_a_full_disk(accelerator, tmp_path):
    for error in (Exception("something else"), ValueError("No space left"), KeyError("os error")):
        with (
            pytest.raises(type(error)) as caught,
            atomic_directory(tmp_path / "target", accelerator, tmp_path),
        ):
            raise error
        assert caught.value is error
        assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_save_are_cleared_away(accelerator, tmp_path):
    (tmp_path / ".saving" / "other").mkdir(parents=True)
    with atomic_directory(tmp_path / "target", accelerator, tmp_path / "checkpoints") as staging:
        fill(staging, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_running_out_of_space_while_saving_keeps_the_last_checkpoint(limit, tmp_path):
    """The limit on file sizes stands in for the disk: the first breaks the weights, the second the optimizer."""
    trainer = trainer_of(
        perturbed_model(), arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1), causal_rows()
    )
    trainer.train()
    model, last = trainer.model, tmp_path / "out" / "checkpoint-3"
    trainer.state.global_step = 4
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot write .*checkpoint-4: .*--resume goes on from .*checkpoint-3$"
        ):
            trainer._save_checkpoint(model, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in last.parent.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    check_checkpoint(last)


def test_progress_is_read_as_it_was_written(tmp_path):
    progress = TrainingProgress(seconds=1.5, tokens=7, skipped_steps=2, processes=3)
    write_progress(tmp_path, progress)
    assert read_progress(tmp_path) == progress


def test_missing_progress_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"progress.json is damaged .*delete"):
        read_progress(tmp_path)


@pytest.fixture
def checkpoint(tmp_path):
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer_of(perturbed_model(), args, causal_rows()).train()
    return tmp_path / "out" / "checkpoint-1"


def test_a_whole_checkpoint_passes(checkpoint):
    check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_file_that_was_cut_off_is_named(name, checkpoint):
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=rf"{name} is damaged .*; delete {checkpoint} to resume from the one"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "progress.json", "files.json"])
def test_a_file_that_is_missing_is_named_and_transformers_does_not_go_on_without_it(name, checkpoint, tmp_path):
    (checkpoint / name).unlink()
    message = rf"{name} is missing; delete {checkpoint} to resume from the one before"
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(checkpoint)
    trainer = trainer_of(perturbed_model(), arguments(tmp_path, max_steps=2), causal_rows())
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_file_of_another_checkpoint_is_named(name, checkpoint):
    other = checkpoint.with_name("checkpoint-2") / name
    if other.read_bytes() == (checkpoint / name).read_bytes():
        pytest.skip("equal in both")
    (checkpoint / name).write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{name} is damaged \(its contents are not those recorded"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000])
def test_a_damaged_list_of_files_is_one_line(content, checkpoint):
    (checkpoint / "files.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"files.json is damaged .*; delete") as caught:
        check_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_optimizers_state_is_found(checkpoint):
    file = checkpoint / "optimizer.pt"
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"optimizer.pt is damaged"):
        check_checkpoint(checkpoint)


def test_a_flipped_bit_in_a_shadows_weights_is_found_on_resuming(checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-5] ^= 1
    file.write_bytes(contents)
    trainer = trainer_of(perturbed_model(), arguments(tmp_path, max_steps=2), causal_rows())
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_resuming_restores_weights_and_optimizer(checkpoint, tmp_path):
    whole = trainer_of(perturbed_model(), arguments(tmp_path / "b", max_steps=2), causal_rows())
    whole.train()
    resumed = trainer_of(perturbed_model(seed=9), arguments(tmp_path, max_steps=2), causal_rows())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in whole.model.shadow.state_dict().items():
        torch.testing.assert_close(resumed.model.shadow.state_dict()[name], tensor, rtol=0, atol=0)
