import json
from dataclasses import replace

import pytest

from shadowtune.config.training import DataConfig, TrainConfig
from shadowtune.errors import CheckpointError, ConfigError, TrainingError
from shadowtune.training.run_directory import MAY_CHANGE, RunDirectory

CONFIG = TrainConfig(data=DataConfig(train="rows.jsonl"))


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def test_another_run_in_the_same_directory_is_kept_out_until_the_first_has_ended(run):
    message = r"another process is training in .*run; wait for it"
    with run.locked(), pytest.raises(TrainingError, match=message), run.locked():
        pass
    with run.locked():
        pass


def test_a_file_in_place_of_the_directory_is_one_clear_line(run):
    run.path.write_text("")
    with pytest.raises(TrainingError, match=r"cannot write to the run directory .*run: File exists"), run.locked():
        pass


def test_a_directory_that_cannot_be_written_is_one_clear_line(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock._acquire", refuse)
    message = r"cannot write to the run directory .*run: Permission denied"
    with pytest.raises(TrainingError, match=message), run.locked():
        pass


def test_a_full_disk_at_the_beginning_is_one_clear_line(run, monkeypatch):
    run.path.mkdir()

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shadowtune.config.loading.os.fsync", refuse)
    with pytest.raises((TrainingError, ConfigError), match="No space left on device"):
        run.begin(CONFIG, resume=False)


def test_a_run_that_is_there_is_neither_trained_over_nor_resumed_with_other_settings(run):
    run.path.mkdir()
    run.check(CONFIG, resume=False, overwrite=False)
    run.begin(CONFIG, resume=False)
    with pytest.raises(TrainingError, match="holds a run already"):
        run.check(CONFIG, resume=False, overwrite=False)
    run.check(CONFIG, resume=False, overwrite=True)
    run.check(CONFIG, resume=True, overwrite=False)
    run.check(replace(CONFIG, epochs=9.0, output="elsewhere"), resume=True, overwrite=False)
    with pytest.raises(ConfigError, match="other settings: seed changed"):
        run.check(replace(CONFIG, seed=1), resume=True, overwrite=False)


def test_settings_that_may_change_exist():
    assert set(MAY_CHANGE) <= vars(CONFIG).keys()


def test_checkpoints_without_settings_count_as_a_run(run):
    (run.checkpoints / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(TrainingError, match="holds a run already"):
        run.check(CONFIG, resume=False, overwrite=False)
    with pytest.raises(CheckpointError, match=r"no config.yaml"):
        run.check(CONFIG, resume=True, overwrite=False)


def test_beginning_anew_removes_what_was_left_and_nothing_else(run):
    for directory in (run.checkpoints / "checkpoint-1", run.model, run.tensorboard):
        directory.mkdir(parents=True)
    run.metrics_file.write_text("{}\n")
    run.summary_file.write_text("{}\n")
    (run.path / "notes.txt").write_text("mine")
    run.begin(CONFIG, resume=False)
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "environment.json", "notes.txt"]
    assert run.read_config() == CONFIG
    assert "commit" in json.loads(run.environment_file.read_text())


def test_resuming_keeps_checkpoints_model_and_metrics(run):
    for directory in (run.checkpoints / "checkpoint-1", run.model):
        directory.mkdir(parents=True)
    run.metrics_file.write_text("{}\n")
    run.begin(CONFIG, resume=True)
    assert run.metrics_file.exists()
    assert run.model.exists()
    assert run.last_checkpoint() == str(run.checkpoints / "checkpoint-1")


def test_resuming_without_a_checkpoint_starts_the_metrics_anew(run):
    run.path.mkdir()
    run.metrics_file.write_text("{}\n")
    run.begin(CONFIG, resume=True)
    assert not run.metrics_file.exists()
    assert run.last_checkpoint() is None


def test_the_last_checkpoint_is_the_one_of_the_most_steps_and_never_one_in_the_making(run):
    for name in ("checkpoint-9", "checkpoint-10", ".saving/checkpoint-11", "checkpoint-12.old"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.last_checkpoint() == str(run.checkpoints / "checkpoint-10")


def test_a_run_is_finished_when_its_model_and_summary_are_there_with_the_same_settings(run):
    run.path.mkdir()
    run.begin(CONFIG, resume=False)
    assert not run.is_finished(CONFIG)
    run.model.mkdir()
    run.summary_file.write_text("{}")
    assert run.is_finished(CONFIG)
    assert run.is_finished(replace(CONFIG, output="moved"))
    assert not run.is_finished(replace(CONFIG, epochs=2.0))
