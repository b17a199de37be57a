import json
import math

import torch
from transformers import TrainerControl, TrainerState

from shadowtune.training.callbacks import MetricsFile, SkipNonfiniteSteps


def state(step, main=True):
    return TrainerState(global_step=step, is_world_process_zero=main)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_log_is_a_line_and_numbers_that_are_none_are_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_log(None, state(1), TrainerControl(), logs={"loss": 2.5})
    file.on_log(None, state(2), TrainerControl(), logs={"loss": 1.5, "grad_norm": math.nan})
    assert lines(file.path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5, "grad_norm": None}]


def test_other_processes_write_nothing(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_log(None, state(1, main=False), TrainerControl(), logs={"loss": 2.5})
    assert not file.path.exists()


def test_resuming_drops_later_lines_and_one_that_was_cut_off(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    file.on_train_begin(None, state(2), TrainerControl())
    assert lines(file.path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}]


def test_a_step_is_left_out_if_any_gradient_is_no_number():
    model = torch.nn.Linear(2, 2)
    callback = SkipNonfiniteSteps()
    for value, kept in ((1.0, True), (math.inf, False), (math.nan, False)):
        model.weight.grad = torch.ones(2, 2)
        model.bias.grad = torch.tensor([0.0, value])
        callback.on_pre_optimizer_step(None, state(1), TrainerControl(), model=model)
        assert (model.weight.grad is not None) == kept
    assert callback.steps == 2
