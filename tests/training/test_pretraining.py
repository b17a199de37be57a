import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shadowtune import ShadowConfig
from shadowtune.config.loading import dump_config
from shadowtune.config.training import DataConfig
from shadowtune.errors import ConfigError
from shadowtune.model.methods import load_trained
from shadowtune.training import run as run_module
from shadowtune.training import teacher_logits
from shadowtune.training.run import build_model, train
from shadowtune.training.stages import prepare_shadow_only
from shadowtune.training.teacher_logits import TeacherLogitsDataset
from shadowtune.training.trainer import BACKBONE_PARTS
from tests.support.runs import model_directory, run_config, snapshot
from tests.support.shadows import perturbed_model, tokens
from tests.training.test_distributed import LAUNCH
from tests.training.test_resume import ENVIRONMENT, assert_resumes_after_a_stop, assert_same_run

SHADOW = {"rank": 4, "update_width": 3, "dropout": 0.0}
TEXT = "the cat in the hat, the hat on the cat. "


def pretrain_config(path: Path, shadow=(), **settings):
    """Settings of 6 steps on a text that repeats itself, in blocks of 16 tokens."""
    text = path / "text.txt"
    text.write_text(TEXT * 16)
    data = DataConfig(train=str(text), validation=str(text), block_size=16)
    shadow = ShadowConfig(**{**SHADOW, **dict(shadow)})
    return run_config(path, **{"data": data, "stage": "pretrain", "shadow": shadow, "max_steps": 6, **settings})


def log(path: Path, name: str):
    """One number of each log line that has it."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def moved(before, after, part):
    """Whether each tensor of a part of the shadow moved."""
    names = [name for name in before if name.startswith(f"shadow.{part}.")]
    assert names
    return {bool((before[name] != after[name]).any()) for name in names}


def saved(run: Path):
    return load_file(run / "model" / "model.safetensors")


def start_of(config):
    return {name: tensor for name, tensor in snapshot(build_model(config)).items() if name.startswith("shadow.")}


def test_the_backbone_learns_while_boundaries_and_base_stay_and_attached_equals_the_base(tmp_path):
    config = pretrain_config(tmp_path, {"hidden_size": 16, "distillation_weight": 0.5})
    before, base = start_of(config), load_file(Path(config.model) / "model.safetensors")
    summary = train(config, quiet=True)
    after = saved(tmp_path / "run")
    assert after.keys() == before.keys(), "the saved shadow is complete"
    assert moved(before, after, "backbone") == moved(before, after, "projection") == {True}
    assert moved(before, after, "boundaries") == {False}
    assert summary.trainable_parameters == sum(t.numel() for n, t in after.items() if ".boundaries." not in n)

    model = load_trained(tmp_path / "run" / "model", "shadow", "causal_lm", config.model)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.base.state_dict().items())
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model.base(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert not torch.equal(model.set_mode("detached")(input_ids=ids).logits, expected)


@pytest.mark.parametrize("weights", [{}, {"shadow_loss_weight": 0.0, "distillation_weight": 1.0}], ids=["text", "base"])
def test_the_loss_falls_on_what_it_learns_from(weights, tmp_path):
    config = pretrain_config(tmp_path, weights, max_steps=30)
    train(config, quiet=True)
    losses = log(tmp_path / "run", "distillation_loss" if weights else "shadow_loss")
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_the_loss_is_the_cross_entropy_of_the_shadow_alone_whatever_lambda_is(tmp_path):
    train(pretrain_config(tmp_path, {"shadow_loss_weight": 0.05}), quiet=True)
    assert log(tmp_path / "run", "loss") == pytest.approx(log(tmp_path / "run", "shadow_loss"))
    assert not log(tmp_path / "run", "base_loss")


def test_a_task_starts_from_the_pretrained_backbone(tmp_path):
    pretraining = pretrain_config(tmp_path, {"hidden_size": 16})
    train(pretraining, quiet=True)
    shadow = replace(pretraining.shadow, init_from=str(tmp_path / "run" / "model"))
    task = run_config(tmp_path, shadow=shadow, output=str(tmp_path / "task"), max_steps=2)
    start, pretrained = snapshot(build_model(task)), saved(tmp_path / "run")
    names = [name for name in pretrained if not name.startswith("shadow.boundaries.")]
    assert len(names) > 5
    assert all(torch.equal(start[name], pretrained[name]) for name in names)
    assert math.isfinite(train(task, quiet=True).final_loss)
    assert True in moved(start, saved(tmp_path / "task"), "boundaries")


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_pretraining_that_stopped_anywhere_resumes_to_the_same_trajectory(stop, tmp_path, monkeypatch):
    shadow = {"hidden_size": 16, "distillation_weight": 0.5, "shadow_loss_weight_end": 0.5}
    config = pretrain_config(tmp_path, shadow, projection_steps=3, max_steps=8, save_steps=1, eval_steps=3)
    assert_resumes_after_a_stop(config, stop, tmp_path, monkeypatch)


def test_the_projections_are_trained_first_and_the_backbone_afterwards(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(run_module, "build_model", lambda *args: built.append(build_model(*args)) or built[-1])
    config = pretrain_config(tmp_path, {"hidden_size": 16}, projection_steps=3, max_steps=3)
    before = start_of(config)
    summary = train(config, quiet=True)
    frozen = saved(tmp_path / "run")
    assert moved(before, frozen, "backbone") == {False}
    assert moved(before, frozen, "projection") == moved(before, frozen, "input_projection") == {True}
    assert summary.trainable_parameters == sum(t.numel() for n, t in frozen.items() if ".boundaries." not in n)
    assert all(parameter.requires_grad for parameter in built[0].shadow.backbone.parameters())

    longer = replace(config, output=str(tmp_path / "longer"), max_steps=4)
    train(longer, quiet=True)
    assert moved(before, saved(tmp_path / "longer"), "backbone") == {True}
    from_the_first = replace(longer, output=str(tmp_path / "first"), projection_steps=0)
    train(from_the_first, quiet=True)
    losses = [log(tmp_path / name, "loss") for name in ("longer", "first")]
    assert losses[0][:2] == losses[1][:2], "the first step warms up: it changes nothing"
    assert losses[0][2] != losses[1][2]


def test_a_shadow_without_projections_cannot_train_them_first(tmp_path):
    with pytest.raises(ConfigError, match=r"^projection_steps=2 .* it has none, because its hidden_size is the base's"):
        train(pretrain_config(tmp_path, projection_steps=2), quiet=True)
    assert not (tmp_path / "run" / "model").exists()


def test_only_boundaries_are_frozen_and_the_mode_is_detached():
    model = perturbed_model(hidden_size=16).train()
    assert prepare_shadow_only(model, 1) is model
    model(input_ids=tokens(2, 7), labels=tokens(2, 7)).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if name.startswith(BACKBONE_PARTS)}


@pytest.mark.parametrize("eval_steps", [None, 4])
def test_the_perplexity_is_that_of_the_detached_shadow_after_the_last_step(eval_steps, tmp_path):
    config = pretrain_config(tmp_path, eval_steps=eval_steps)
    summary = train(config, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps, losses = zip(*((line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line), strict=True)
    assert steps[-1] == 6
    assert summary.detached_perplexity == pytest.approx(math.exp(losses[-1]))
    model = load_trained(tmp_path / "run" / "model", "shadow", "causal_lm", config.model).set_mode("detached").eval()
    rows = run_module.load_training_data(config).validation
    with torch.no_grad():
        batches = [torch.tensor([list(row["input_ids"])]) for row in rows]
        each = [model(input_ids=batch, labels=batch).loss.item() for batch in batches]
    assert sum(each) / len(each) == pytest.approx(losses[-1], rel=0.02)
    assert train(config, resume=True, quiet=True) == summary


def test_without_validation_rows_and_in_a_task_there_is_no_perplexity(tmp_path):
    config = pretrain_config(tmp_path, max_steps=1)
    assert train(replace(config, data=replace(config.data, validation=None)), quiet=True).detached_perplexity is None
    task = run_config(tmp_path, output=str(tmp_path / "task"), max_steps=1)
    task = replace(task, data=replace(task.data, validation=task.data.train))
    assert train(task, quiet=True).detached_perplexity is None


TAUGHT = {"hidden_size": 16, "distillation_weight": 0.5, "distillation_temperature": 2.0, "distillation_top_k": 5}


def cached_config(path: Path, **settings):
    """Settings of 3 epochs of 10 rows with 3 rows to a file, in batches of 2, of which 2 make a step."""
    common = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": None, "epochs": 3.0}
    config = pretrain_config(path, TAUGHT, **{**common, "distillation_cache": str(path / "kept"), **settings})
    return replace(config, data=replace(config.data, validation=None, block_size=45))


@pytest.fixture
def calls(monkeypatch):
    """Rows of each forward pass of a base in training; files of the cache hold three rows."""
    seen = []

    def build(*args):
        model = build_model(*args)
        decoder = model.architecture.decoder_of(model.base)
        decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        return model

    monkeypatch.setattr(run_module, "build_model", build)
    monkeypatch.setattr(teacher_logits, "EXAMPLES_PER_FILE", 3)
    return seen


@pytest.mark.parametrize("settings", [{}, {"padding_free": True}, {"group_by_length": True}], ids=str)
def test_with_a_cache_the_loss_is_the_same_and_no_step_runs_the_base(settings, tmp_path, calls):
    config = cached_config(tmp_path, **settings)
    train(replace(config, distillation_cache=None, output=str(tmp_path / "fresh")), quiet=True)
    assert len(calls) == 3 * 5
    calls.clear()
    lines = []
    train(config, report=lines.append, quiet=True)
    assert len(calls) == 2 + 2 + 2 + 1, "three rows are a batch of two and one of one"
    assert "4 files of up to 3 rows to be filled" in "".join(lines)
    calls.clear()
    again = replace(config, output=str(tmp_path / "again"))
    lines.clear()
    train(again, report=lines.append, quiet=True)
    assert not calls
    assert "all known" in "".join(lines)
    assert_same_run(tmp_path / "again", tmp_path / "run")
    for name in ("loss", "distillation_loss", "shadow_loss"):
        fresh, cached = (log(tmp_path / run, name) for run in ("fresh", "run"))
        assert len(fresh) == 3 * 3
        assert cached == pytest.approx(fresh, rel=1e-5)
    for name, tensor in saved(tmp_path / "fresh").items():
        torch.testing.assert_close(saved(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [2, 5])
def test_pretraining_with_a_cache_resumes_to_the_same_trajectory(stop, tmp_path, monkeypatch):
    assert_resumes_after_a_stop(cached_config(tmp_path, save_steps=1), stop, tmp_path, monkeypatch)


def test_filling_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, calls):
    config = cached_config(tmp_path)
    write = TeacherLogitsDataset.write

    def write_or_stop(taught, first, top):
        if first == 6:
            raise KeyboardInterrupt
        write(taught, first, top)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherLogitsDataset, "write", write_or_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, quiet=True)
    names = sorted(file.name for file in (tmp_path / "kept").iterdir())
    assert names == ["rows-00000000.safetensors", "rows-00000003.safetensors"]
    calls.clear()
    train(config, resume=True, quiet=True)
    assert calls == [2, 1, 1], "rows 6 to 9"


def test_a_cache_serves_other_runs_of_the_same_teacher_and_rows_and_no_others(tmp_path, calls):
    config = cached_config(tmp_path, max_steps=1)
    train(config, quiet=True)
    calls.clear()
    shadow = replace(config.shadow, hidden_size=24, shadow_loss_weight=1.0, distillation_weight=0.2)
    alike = replace(config, shadow=shadow, seed=1, batch_size=3, output=str(tmp_path / "alike"))
    train(alike, quiet=True)
    assert not calls
    for changed, message in (
        ({"shadow": replace(config.shadow, distillation_top_k=4)}, "distillation_top_k 5 and not 4"),
        (
            {"shadow": replace(config.shadow, distillation_temperature=1.0)},
            r"distillation_temperature 2\.0 and not 1\.0",
        ),
        ({"data": replace(config.data, block_size=32)}, "rows .* and not"),
        ({"base_dtype": "bfloat16"}, "head .*base_dtype float32 and not bfloat16"),
        ({"autocast": True}, "autocast False and not True"),
        ({"model": model_directory(tmp_path / "other", tie_word_embeddings=True)}, "head .* and not"),
    ):
        with pytest.raises(ConfigError, match=f"was filled for another run: it has {message}"):
            train(replace(config, output=str(tmp_path / "other-run"), **changed), overwrite=True, quiet=True)


@pytest.mark.parametrize("kept", [False, True], ids=["whole vocabulary", "cache"])
def test_two_processes_pretrain_like_one_even_if_checkpointed(kept, tmp_path):
    shadow = {"hidden_size": 16, "distillation_weight": 0.5, "distillation_top_k": 5 if kept else None}
    one = pretrain_config(tmp_path, shadow, projection_steps=2, max_steps=4, output=str(tmp_path / "one"))
    if kept:  # two files at least, one for each process
        (tmp_path / "text.txt").write_text(TEXT * 50)
        one = replace(one, data=replace(one.data, block_size=4))
    train(one, quiet=True)
    two = replace(one, batch_size=2, gradient_checkpointing="non_reentrant", output=str(tmp_path / "two"))
    two = replace(two, distillation_cache=str(tmp_path / "kept") if kept else None)
    dump_config(two, tmp_path / "two.yaml")
    command = [*LAUNCH, "pretrain", str(tmp_path / "two.yaml"), "--quiet"]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Pretrained:") == 1
    assert done.stderr.count("teacher: 2 of 2 files") == kept
    for name in ("loss", "eval_loss"):
        assert log(tmp_path / "two", name) == pytest.approx(log(tmp_path / "one", name), rel=1e-3)
    weights, expected = saved(tmp_path / "two"), saved(tmp_path / "one")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (weights[name] - tensor).abs().max() < 1e-3, name
