"""Early stopping, the best checkpoint, sample answers and progress lines, also across interruptions."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from shadowtune import ShadowConfig
from shadowtune.config.loading import dump_config
from shadowtune.config.training import DataConfig, LoraConfig, OptimizerConfig
from shadowtune.errors import CheckpointError, ConfigError, TrainingError
from shadowtune.training.run import train
from shadowtune.training.trainer import ShadowTrainer
from tests.support.runs import rows_file, run_config

METHODS = ("shadow", "lora", "full")


def watched_config(path, **settings):
    """18 steps, an evaluation every second one; the validation answers are others, so that their loss rises again."""
    path.mkdir(exist_ok=True)
    validation = [{"prompt": f"add {each} and {each}", "completion": "zebra" * (each + 1)} for each in range(4)]
    (path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in validation))
    common = {
        "data": DataConfig(train=rows_file(path / "train.jsonl"), validation=str(path / "validation.jsonl")),
        "shadow": ShadowConfig(rank=4, update_width=3, dropout=0.1),
        "lora": LoraConfig(rank=2),
        "optimizer": OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_ratio=0.0),
        "epochs": 6.0,
        "eval_steps": 2,
        "samples": 2,
    }
    return run_config(path, **{**common, **settings})


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluations(run):
    return [line for line in lines(run / "metrics.jsonl") if "eval_loss" in line]


def weights(directory):
    return load_file(next(directory.glob("*.safetensors")))


def assert_equal_weights(left, right):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    assert all(left[name].equal(tensor) for name, tensor in right.items())


def stop_before(step, config, monkeypatch):
    """Train until ``step``, as if the process had ended there."""
    real = ShadowTrainer.training_step

    def training_step(trainer, *args, **kwargs):
        if trainer.state.global_step == step:
            raise TrainingError("stopped")
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(ShadowTrainer, "training_step", training_step)
    with pytest.raises(TrainingError, match="stopped"):
        train(config, quiet=True)
    monkeypatch.undo()


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tmp_path_factory):
    """A run of each method that stops early and ends with its best weights, with what it reported."""
    path = tmp_path_factory.mktemp(request.param)
    reported = []
    config = watched_config(path, method=request.param, early_stopping_patience=2, load_best_model_at_end=True)
    return config, train(config, report=reported.append), reported, path


def test_training_stops_after_evaluations_without_a_better_loss_and_ends_with_the_best_weights(finished):
    _, summary, reported, path = finished
    losses = {line["step"]: line["eval_loss"] for line in evaluations(path / "run")}
    best = min(losses, key=losses.get)
    assert summary.steps == best + 4 < 18, losses
    assert (summary.best_step, summary.best_metric) == (best, losses[best])
    checkpoints = sorted(directory.name for directory in (path / "run" / "checkpoints").iterdir())
    assert checkpoints == sorted([f"checkpoint-{best}", f"checkpoint-{best + 4}"])
    assert_equal_weights(path / "run" / "model", path / "run" / "checkpoints" / f"checkpoint-{best}")
    assert any(f"at step {best} of {best + 4}; its weights are kept" in line for line in reported)


def test_samples_of_each_evaluation_are_shown_and_kept(finished):
    config, _, reported, path = finished
    found = lines(path / "run" / "samples.jsonl")
    steps = [line["step"] for line in evaluations(path / "run")]
    assert [line["step"] for line in found] == [step for step in steps for _ in range(2)]
    modes = {"attached", "detached"} if config.method == "shadow" else {"model"}
    assert all(line.keys() == {"step", "prompt", "expected", *modes} for line in found)
    assert (found[0]["prompt"], found[0]["expected"]) == ("user\nadd 0 and 0\nassistant", "zebra")
    assert any(line[mode] != line["expected"] for line in found for mode in modes)
    shown = [line for line in reported if line.startswith("sample ")]
    assert len(shown) == len(found)
    assert shown[0].startswith('sample "user add 0 and 0 assistant" -> ')
    assert '(expected: "zebra")' in shown[0]


def test_without_a_terminal_progress_is_whole_lines(finished):
    _, _, reported, path = finished
    (first,) = (line for line in reported if line.startswith("step 1 of 18 (6%): loss "))
    assert first.endswith(" left")
    measured = [line for line in reported if "validation loss" in line]
    assert len(measured) == len(evaluations(path / "run"))


def test_in_a_terminal_the_same_lines_are_above_the_bar_and_none_is_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    config = watched_config(tmp_path, max_steps=2)
    reported = []
    train(config, report=reported.append)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 2 of 2 (100%): loss " in shown.err
    assert "sample " in shown.err
    assert "2/2" in shown.err
    assert not any(line.startswith(("step ", "sample ")) for line in reported)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_stops_where_the_whole_one_stopped(method, tmp_path, monkeypatch):
    settings = {"method": method, "early_stopping_patience": 2, "load_best_model_at_end": True}
    whole = train(watched_config(tmp_path, output=str(tmp_path / "whole"), **settings), quiet=True)
    config = watched_config(tmp_path, **settings)
    stop_before(whole.best_step + 3, config, monkeypatch)  # one evaluation was no better
    moved = replace(config, output=str(tmp_path / "moved"))
    (tmp_path / "run").rename(tmp_path / "moved")  # the best checkpoint is found at its new path
    resumed = train(moved, resume=True, quiet=True)
    assert (resumed.steps, resumed.best_step) == (whole.steps, whole.best_step)
    assert_equal_weights(tmp_path / "moved" / "model", tmp_path / "whole" / "model")
    assert lines(tmp_path / "moved" / "samples.jsonl") == lines(tmp_path / "whole" / "samples.jsonl")
    pairs = [[(line["step"], line["eval_loss"]) for line in evaluations(tmp_path / run)] for run in ("moved", "whole")]
    assert pairs[0] == pairs[1]


def test_a_run_that_was_killed_after_it_stopped_early_takes_no_further_step(finished, tmp_path):
    config, summary, _, path = finished
    shutil.copytree(path / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    again = train(replace(config, output=str(tmp_path / "run")), resume=True, quiet=True)
    assert (again.steps, again.best_step) == (summary.steps, summary.best_step)
    assert_equal_weights(tmp_path / "run" / "model", path / "run" / "model")


def test_samples_change_no_weights_and_evaluations_have_the_terms_of_the_loss(tmp_path):
    uneven = {"batch_size": 3, "padding_free": True}  # four validation examples
    config = watched_config(tmp_path, max_steps=5, optimizer=OptimizerConfig(learning_rate=1e-2), **uneven)
    train(replace(config, output=str(tmp_path / "shown")), quiet=True)
    train(replace(config, output=str(tmp_path / "hidden"), samples=0), quiet=True)
    assert_equal_weights(tmp_path / "shown" / "model", tmp_path / "hidden" / "model")
    assert not (tmp_path / "hidden" / "samples.jsonl").exists()
    for line in evaluations(tmp_path / "shown"):
        joint = line["eval_base_loss"] + config.shadow.shadow_loss_weight * line["eval_shadow_loss"]
        assert line["eval_loss"] == pytest.approx(joint, rel=1e-5)


def test_the_shadow_only_stage_has_samples_of_the_detached_model(tmp_path):
    config = watched_config(tmp_path, shadow_epochs=1.0, early_stopping_patience=1, eval_steps=None, epochs=1.0)
    train(config, quiet=True)
    found = lines(tmp_path / "run" / "shadow" / "samples.jsonl")
    assert all(line.keys() == {"step", "prompt", "expected", "detached"} for line in found)
    assert len(found) == 2
    assert not (tmp_path / "run" / "shadow" / "checkpoints").exists()
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("values", "expected", "possible"),
    [
        ([2, 0, 1], ["2", "0", "1"], {"0", "1", "2"}),
        (["red", "blue", "red"], ["red", "blue", "red"], {"red", "blue"}),
        ([["red"], ["red", "blue"], []], ["red", "blue, red", ""], {"", "red", "blue", "blue, red"}),
        ([0.5, -1.25, 3.5], ["0.5", "-1.25", "3.5"], None),
    ],
    ids=["numbers", "names", "several", "regression"],
)
def test_a_classifiers_samples_are_its_classes(values, expected, possible, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = [{"text": f"add {index} and 1", "label": value} for index, value in enumerate(values)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    data = DataConfig(train=str(rows), validation=str(rows))
    train(run_config(tmp_path, "classification", data=data, samples=3, max_steps=1), quiet=True)
    found = lines(tmp_path / "run" / "samples.jsonl")
    assert [line["expected"] for line in found] == expected
    for line in found:
        for mode in ("attached", "detached"):
            assert float(line[mode]) is not None if possible is None else line[mode] in possible


def test_a_finished_run_keeps_no_checkpoint_if_none_is_asked_for(tmp_path):
    config = watched_config(tmp_path, keep_checkpoints=0, load_best_model_at_end=True, max_steps=4)
    summary = train(config, quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "model").is_dir()
    reports_otherwise = replace(config, logging_steps=2, samples=0, keep_checkpoints=2)
    assert train(reports_otherwise, resume=True, quiet=True) == summary
    with pytest.raises(CheckpointError, match="kept no checkpoint"):
        train(replace(config, max_steps=6), resume=True, quiet=True)


def test_a_best_checkpoint_that_is_gone_is_an_error(tmp_path, monkeypatch):
    config = watched_config(tmp_path, method="full", load_best_model_at_end=True, max_steps=8)
    stop_before(7, config, monkeypatch)
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_global_step"] < 6
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint-{state['best_global_step']}")
    with pytest.raises(TrainingError, match=f"the best checkpoint, of step {state['best_global_step']}, is gone"):
        train(config, resume=True, quiet=True)


def test_evaluations_that_are_compared_stay_where_they_were(tmp_path, monkeypatch):
    config = watched_config(tmp_path, early_stopping_patience=5)
    stop_before(4, config, monkeypatch)
    with pytest.raises(ConfigError, match="eval_steps changed"):
        train(replace(config, eval_steps=3), resume=True, quiet=True)


FAKE_WANDB = """
import json, sys, types
run, log, calls = None, None, []
class Config(dict): pass
def init(**settings):
    global run, config
    calls.append(("init", settings["name"]))
    run, config = types.SimpleNamespace(_label=lambda code: None, summary={}), Config()
def define_metric(*args, **kwargs): pass
def log(values): calls.append(("log", values))
def finish():
    global run
    calls.append(("finish", None))
    run = None
class ConfigError(Exception): pass
for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
    sys.modules[name] = types.SimpleNamespace(ConfigError=ConfigError)
"""


def test_a_tracker_has_a_run_for_each_stage_with_its_metrics(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = watched_config(tmp_path / "files", report_to=["wandb"], shadow_epochs=1.0, epochs=1.0, samples=0)
    train(config, quiet=True)
    calls = sys.modules.pop("wandb").calls
    assert [(kind, name) for kind, name in calls if kind != "log"] == [
        ("init", f"{config.output}/shadow"),
        ("finish", None),
        ("init", config.output),
        ("finish", None),
    ]
    logged = [values for kind, values in calls if kind == "log"]
    measured = [values["eval/base_loss"] for values in logged if "eval/base_loss" in values]
    assert measured == [line["eval_base_loss"] for line in evaluations(tmp_path / "files" / "run")]


@pytest.mark.process
def test_a_log_file_has_whole_lines_and_no_fragments_of_progress_bars(tmp_path):
    config = watched_config(tmp_path, max_steps=3, shadow_epochs=1.0)
    dump_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "shadowtune", "train", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("TQDM_DISABLE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for fragment in ("\r", "it/s", "%|"):
        assert fragment not in done.stdout + done.stderr, done.stderr
    assert "step 3 of 3 (100%): loss " in done.stderr
    assert "{'loss'" not in done.stdout
    assert done.stderr.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
