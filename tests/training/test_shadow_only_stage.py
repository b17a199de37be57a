import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shadowtune import ShadowConfig
from shadowtune.errors import ConfigError, TrainingError
from shadowtune.model.modeling import ShadowPreTrainedModel
from shadowtune.model.shadow import Shadow
from shadowtune.training import run as run_module
from shadowtune.training.run import build_model, train
from shadowtune.training.stage_settings import joint_settings, shadow_only_settings
from tests.support.runs import run_config, snapshot
from tests.training.test_resume import assert_same_run

SHADOW = {"rank": 4, "update_width": 3, "dropout": 0.0, "init_layers": (0,), "distillation_weight": 0.5}


def config_in(path: Path, **settings):
    settings = {"shadow": ShadowConfig(**SHADOW), "shadow_epochs": 2.0, "max_steps": 3, **settings}
    return run_config(path, **settings)


def saved(run: Path):
    return load_file(run / "model" / "model.safetensors")


def test_the_shadow_learns_alone_and_then_beside_its_base(tmp_path):
    config = config_in(tmp_path)
    begun = snapshot(build_model(config))
    summary = train(config, quiet=True)
    first, whole = saved(Path(config.output) / "shadow"), saved(Path(config.output))
    assert len(whole.pop("shadow.draft_vocabulary")) > 1
    assert first.keys() == whole.keys()
    for name, tensor in first.items():
        backbone = name.startswith("shadow.backbone")
        assert bool((tensor != begun[name]).any()) == backbone, name
        assert bool((whole[name] != tensor).any()), name
    expected = snapshot(build_model(joint_settings(config)))
    assert all(torch.equal(expected[name], first[name]) for name in first if name.startswith("shadow.backbone"))
    told = json.loads((Path(config.output) / "shadow" / "summary.json").read_text())
    assert summary.shadow_seconds == told["train_seconds"] < summary.train_seconds


def test_alone_it_learns_from_the_text_and_never_runs_the_base(tmp_path, monkeypatch):
    config = config_in(tmp_path, optimizer=replace(run_config(tmp_path).optimizer, backbone_learning_rate=1e-5))
    modes = []
    encode = ShadowPreTrainedModel.encode

    def spy(self, *args, **kwargs):
        modes.append(self.mode)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(ShadowPreTrainedModel, "encode", spy)
    train(shadow_only_settings(config), quiet=True)
    assert set(modes) == {"detached"}
    own = shadow_only_settings(config)
    assert (own.shadow.shadow_loss_weight, own.shadow.distillation_weight) == (1.0, 0.0)
    assert (own.epochs, own.max_steps, own.optimizer.backbone_learning_rate) == (2.0, None, None)
    assert own.shadow.init_layers == (0,)


STATELESS = {"variant": "stateless", "alpha": 0.01, "shadow_loss_weight": 0.0, "distillation_weight": 0.0}


def test_a_stateless_shadow_rests_while_its_boundaries_learn(tmp_path, monkeypatch):
    config = config_in(tmp_path, shadow=ShadowConfig(**{**SHADOW, **STATELESS}))
    ran = []
    run = Shadow.run

    def spy(self, *args, **kwargs):
        ran.append(torch.is_grad_enabled())
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Shadow, "run", spy)
    train(shadow_only_settings(config), quiet=True)
    passes_alone = len(ran)
    summary = train(config, overwrite=True, quiet=True)
    assert len(ran) == 2 * passes_alone > 0, "it ran in its own part only"
    first, whole = saved(Path(config.output) / "shadow"), saved(Path(config.output))
    for name, tensor in first.items():
        moved = bool((whole[name] != tensor).any())
        assert moved == name.startswith("shadow.boundaries.injection"), name
    everything = sum(p.numel() for p in build_model(config).shadow.parameters())
    assert summary.trainable_parameters == everything, "what its own part trained counts"


def test_where_the_shadow_is_never_trained_it_does_not_count(tmp_path):
    config = config_in(tmp_path, shadow=ShadowConfig(**{**SHADOW, **STATELESS}), shadow_epochs=0.0)
    boundaries = build_model(config).shadow.boundaries
    summary = train(config, quiet=True)
    assert summary.trainable_parameters == sum(p.numel() for p in boundaries.parameters())


def test_a_stateless_shadow_with_a_loss_of_its_own_learns_beside_its_base(tmp_path):
    config = config_in(
        tmp_path, shadow=ShadowConfig(**{**SHADOW, **STATELESS, "shadow_loss_weight": 0.5}), shadow_epochs=0.0
    )
    begun = snapshot(build_model(config))
    train(config, quiet=True)
    whole = saved(Path(config.output))
    for name, tensor in begun.items():
        if name in whole:
            measured = name.endswith(("channel_scales", "input_sizes"))
            assert bool((whole[name] != tensor).any()) != measured, name


@pytest.mark.parametrize(("given", "expected"), [(None, 2e-3), (7e-3, 7e-3)])
def test_alone_it_may_have_a_learning_rate_of_its_own(tmp_path, given, expected):
    rates = replace(run_config(tmp_path).optimizer, learning_rate=2e-3, backbone_learning_rate=1e-5)
    config = config_in(tmp_path, optimizer=rates, shadow_learning_rate=given)
    assert shadow_only_settings(config).optimizer == replace(rates, learning_rate=expected, backbone_learning_rate=None)
    assert joint_settings(config).optimizer == rates


class StoppedError(Exception):
    pass


def test_a_run_stopped_between_its_parts_goes_on_to_the_same_end(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, cut = config_in(tmp_path / "a"), config_in(tmp_path / "b")
    cut = replace(cut, data=whole.data, model=whole.model)
    train(whole, quiet=True)
    with monkeypatch.context() as patched:

        def stop(config):
            raise StoppedError

        patched.setattr(run_module, "joint_settings", stop)
        with pytest.raises(StoppedError):
            train(cut, quiet=True)
    with pytest.raises(TrainingError, match="--resume"):
        train(cut, quiet=True)
    train(cut, resume=True, quiet=True)
    assert_same_run(Path(whole.output), Path(cut.output))


@pytest.mark.parametrize("settings", [{"task": "classification"}, {"stage": "pretrain"}])
def test_only_a_shadow_of_a_language_model_can_go_first(tmp_path, settings):
    with pytest.raises(ConfigError, match=r"shadow_epochs=2\.0 needs"):
        config_in(tmp_path, **settings)


def test_a_method_without_a_shadow_trains_as_without_the_setting(tmp_path):
    config = config_in(tmp_path, method="full")
    assert not config.has_shadow_only_stage
    assert train(config, quiet=True).shadow_seconds is None
    assert not (Path(config.output) / "shadow").exists()
