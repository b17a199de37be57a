"""Two processes that share the weights give the result of one: sharded loading, ZeRO stage 3, tensor parallelism."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from shadowtune import ShadowConfig, ShadowForCausalLM, attach
from shadowtune.attach import sharded_loading
from shadowtune.attach.sharding import is_part, loaded_in_parts, whole_shape, whole_state, write_whole
from shadowtune.config.training import DataConfig, LoraConfig, TrainConfig
from shadowtune.errors import AttachError, TrainingError
from shadowtune.model.fingerprint import base_fingerprint, base_signature
from shadowtune.model.initialization import measure_channel_scales
from shadowtune.model.methods import load_base_in_parts
from shadowtune.training.run import train
from shadowtune.training.sharding import ShardedTrainer
from shadowtune.training.stages import prepare_shadow_only
from tests.support.bases import CONFIGS, tiny_base
from tests.support.processes import run_processes
from tests.support.runs import arguments, causal_rows, model_directory, rows_file, run_config, trainer_of
from tests.support.shadows import perturbed_model, tokens

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # else the tiny parameters stay whole
    },
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    ),
}
SETTINGS = {
    "joint": {},
    "base_layers": {"init_layers": (1,), "distillation_weight": 0.5},
    "pruned": {"init_layers": (0,), "hidden_size": 16, "num_attention_heads": 2, "variant": "stateless"},
}


def learn(folder: Path, base, mode: str, settings, batch: int, **options):
    """Train a new shadow of a base for three steps; what is compared."""
    torch.manual_seed(1)
    model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=4, update_width=3, dropout=0.0, **settings))
    with torch.no_grad():
        model.shadow.boundaries.injection_ups.normal_(std=0.1)
    model.set_mode(mode)
    model.shadow.boundaries.requires_grad_(mode == "attached")
    plain = {"max_steps": 3, "weight_decay": 0.1, "max_grad_norm": 1.0, "logging_steps": 1}
    args = arguments(folder, per_device_train_batch_size=batch, **plain, **options)
    trainer = trainer_of(model, args, causal_rows(12), backbone_learning_rate=3e-3)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    log = [
        {name: line[name] for name in ("loss", "shadow_loss", "grad_norm")} for line in trainer.state.log_history[:3]
    ]
    return model, log, (model.config.base_fingerprint, model.config.base_signature)


def with_zero3(folder: Path, directory: str, settings, mode: str):
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    args = arguments(folder, deepspeed=ZERO3, per_device_train_batch_size=2, max_steps=3)  # before the base is loaded
    base = AutoModelForCausalLM.from_pretrained(directory)
    assert base.get_input_embeddings().weight.numel() == 0
    assert args.deepspeed_plugin is not None
    return learn(folder, base, mode, settings, 2, deepspeed=ZERO3)[1:]


class Spoil(TrainerCallback):
    """Puts NaN into a weight after a step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weight = model.shadow.boundaries.injection_ups
        write_whole(weight, torch.full(whole_shape(weight), torch.nan))


def save_spoiled_weights(folder: Path, directory: str):
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    args = arguments(folder, deepspeed=ZERO3, max_steps=1, save_strategy="steps", save_steps=1)
    model = ShadowForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(directory), ShadowConfig(rank=4))
    trainer = trainer_of(model, args, causal_rows(12))
    trainer.add_callback(Spoil)
    with pytest.raises(TrainingError, match="injection_ups holds NaN"):
        trainer.train()
    return list(folder.glob("**/model.safetensors"))


def with_tensor_parallelism(folder: Path, directory: str, settings, mode: str):
    import accelerate.parallelism_config

    # accelerate knows tensor parallelism on accelerators only
    accelerate.parallelism_config.ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    torch.distributed.init_process_group("gloo")
    base = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_size=2))
    model, *found = learn(folder, base, mode, settings, 4)
    return (*found, outputs(model.eval()))


def alone(folder: Path, directory: str, settings, mode: str):
    model, *found = learn(folder, AutoModelForCausalLM.from_pretrained(directory), mode, settings, 4)
    return (*found, outputs(model.eval()))


@torch.no_grad()
def outputs(model):
    ids = tokens(2, 6)
    logits = [model.set_mode(mode)(input_ids=ids).logits for mode in ("detached", "base", "attached")]
    detached = model.detached()(input_ids=ids).logits
    return [*logits, detached, model.generate(ids, max_new_tokens=4, do_sample=False, speculate=True)]


def compare(one, two, first: Path, second: Path, atol: float = 2e-5):
    for line, other in zip(one[0], two[0], strict=True):
        assert other == pytest.approx(line, rel=1e-4)
    assert one[1] == two[1]
    expected, found = (load_file(path / "model" / "model.safetensors") for path in (first, second))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor.*:FutureWarning")  # deepspeed calls it
@pytest.mark.filterwarnings("ignore:.*reduce_scatter_tensor.*:FutureWarning")
@pytest.mark.parametrize(
    ("settings", "mode"), [("joint", "attached"), ("base_layers", "detached"), ("pruned", "attached")]
)
def test_zero_3_gives_the_result_of_one_process(settings, mode, tmp_path):
    pytest.importorskip("deepspeed")
    directory = model_directory(tmp_path / "base")
    given = (directory, SETTINGS[settings], mode)
    (one,) = run_processes(alone, 1, tmp_path / "1", tmp_path / "one", *given)
    two = run_processes(with_zero3, 2, tmp_path / "2", tmp_path / "two", *given, DS_ACCELERATOR="cpu")
    for each in two:
        compare(one, each, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor.*:FutureWarning")  # deepspeed calls it
@pytest.mark.filterwarnings("ignore:.*reduce_scatter_tensor.*:FutureWarning")
def test_a_weight_with_nan_that_zero_3_keeps_in_parts_is_not_saved(tmp_path):
    pytest.importorskip("deepspeed")
    directory = model_directory(tmp_path / "base")
    found = run_processes(save_spoiled_weights, 2, tmp_path / "2", tmp_path / "two", directory, DS_ACCELERATOR="cpu")
    assert found == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "tied"), [("joint", False), ("base_layers", True)])
def test_tensor_parallelism_gives_the_result_of_one_process(settings, tied, tmp_path):
    directory = model_directory(tmp_path / "base", tie_word_embeddings=tied)
    given = (directory, SETTINGS[settings], "attached")
    (one,) = run_processes(alone, 1, tmp_path / "1", tmp_path / "one", *given)
    two = run_processes(with_tensor_parallelism, 2, tmp_path / "2", tmp_path / "two", *given)
    for each in two:
        compare(one, each, tmp_path / "one", tmp_path / "two")
        for expected, found in zip(one[2], each[2], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def parts_of(directories: list[str]):
    """What two processes find in bases of which each has read its part."""
    torch.distributed.init_process_group("gloo")
    found = []
    for directory in directories:
        base = load_base_in_parts(directory, "causal_lm", torch.device("cpu"))
        parameters = list(base.parameters())
        assert all(is_part(parameter) for parameter in parameters)
        found.append(described(base) | {"held": sum(cast(Any, each).to_local().numel() for each in parameters)})
    return found


def described(base):
    """Weights, buffers, and what the start of a shadow reads of a base."""
    return {
        "weights": whole_state(base),
        "buffers": {name: buffer.clone() for name, buffer in base.named_buffers()},
        "config": base.config.to_dict(),
        "fingerprint": (base_fingerprint(base), base_signature(base)),
        "scales": measure_channel_scales(base),
    }


FAST = [("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("mixtral", {})]  # tied, positions, stacked experts
SLOW = [("llama", {"tie_word_embeddings": False}), *((kind, {}) for kind in CONFIGS if kind != "llama")]


@pytest.mark.parametrize("kinds", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["few", "all"])
def test_each_process_reads_its_part_of_a_base(kinds, tmp_path):
    directories = []
    for kind, overrides in kinds:
        directories.append(str(tmp_path / kind))
        tiny_base(kind, **overrides).save_pretrained(directories[-1])
    both = run_processes(parts_of, 2, tmp_path / "processes", directories)
    for directory, *found in zip(directories, *both, strict=True):
        base = AutoModelForCausalLM.from_pretrained(directory)
        expected = described(base)
        assert sum(each.pop("held") for each in found) == sum(parameter.numel() for parameter in base.parameters())
        for each in found:
            for kind in ("weights", "buffers"):
                torch.testing.assert_close(each.pop(kind), expected[kind], rtol=0, atol=0, msg=f"{directory}, {kind}")
            torch.testing.assert_close(each.pop("scales"), expected["scales"], rtol=1e-5, atol=1e-6)
            assert each == {name: expected[name] for name in ("config", "fingerprint")}, directory


def train_with_parts(configs: list[TrainConfig]):
    """Train runs of which each process reads only its part of the base; what their trainers found."""
    held = []
    prepare = ShardedTrainer._prepare_for_training

    def watched(self, *args):
        held.append(loaded_in_parts(self.model))
        return prepare(self, *args)

    ShardedTrainer._prepare_for_training = watched
    for config in configs:
        train(config, resume=True, quiet=True)
        AcceleratorState._reset_state()
    return held


def test_training_with_a_base_in_parts_gives_the_result_of_one_process(tmp_path):
    model_directory(tmp_path / "model-causal_lm", tie_word_embeddings=True)
    rows = rows_file(tmp_path / "causal_lm.jsonl")
    runs = {
        "shadow": {
            "shadow": ShadowConfig(rank=4, update_width=3, dropout=0.0, init_layers=(1,)),
            "fit_logit_interpolation": True,
            "save_steps": 2,
        },
        "lora": {"method": "lora", "shadow": ShadowConfig(), "lora": LoraConfig(rank=4, dropout=0.0)},
    }
    for name, changes in runs.items():
        common = {"output": str(tmp_path / f"one {name}"), "data": DataConfig(train=rows, validation=rows)}
        runs[name] = run_config(tmp_path, **{**common, **changes})
        train(runs[name], quiet=True)
    both = [replace(config, batch_size=2, output=config.output.replace("one ", "two ")) for config in runs.values()]
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    found = run_processes(train_with_parts, 2, tmp_path / "first", both, **launched)
    assert found == [[True, True]] * 2
    (tmp_path / "two shadow" / "summary.json").unlink()  # as if it had been stopped after the last step
    found = run_processes(train_with_parts, 2, tmp_path / "again", both, **launched)
    assert found == [[True]] * 2
    for name in runs:
        (file,) = (tmp_path / f"one {name}" / "model").glob("*model.safetensors")
        expected, trained = load_file(file), load_file(tmp_path / f"two {name}" / "model" / file.name)
        assert expected.keys() == trained.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(trained[key], tensor, rtol=0, atol=1e-4, msg=key)


def with_fsdp_of_transformers(folder: Path, directory: str, settings):
    """Train, save, reload beside a base in parts, and train the shadow alone."""
    torch.distributed.init_process_group("gloo")
    layout = {"distributed_config": DistributedConfig(fsdp_size=2)}
    base = AutoModelForCausalLM.from_pretrained(directory, **layout)
    with pytest.raises(AttachError, match="fsdp_size=2"):
        attach(base, perturbed_model().shadow)
    model, *found = learn(folder, base, "attached", settings, 2)
    results = [(*found, outputs(model.eval()))]
    again = ShadowForCausalLM.from_pretrained(folder / "model", **layout)
    assert loaded_in_parts(again)
    results.append((*learn_further(folder, again, 2), outputs(again.eval())))
    return results


def without_fsdp(folder: Path, directory: str, settings):
    results = [alone(folder, directory, settings, "attached")]
    again = ShadowForCausalLM.from_pretrained(folder / "model")
    results.append((*learn_further(folder, again, 4), outputs(again.eval())))
    return results


def learn_further(folder: Path, model, batch: int):
    """Train the shadow of a model alone for two steps."""
    args = arguments(folder, per_device_train_batch_size=batch, max_steps=2, logging_steps=1)
    trainer = trainer_of(prepare_shadow_only(model), args, causal_rows(12))
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return [{"loss": line["loss"]} for line in trainer.state.log_history[:2]], model.config.base_fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "tied"), [("joint", False), ("base_layers", True)])
def test_a_base_that_transformers_sharded_by_fsdp_trains_like_one_process(settings, tied, tmp_path):
    given = (model_directory(tmp_path / "base", tie_word_embeddings=tied), SETTINGS[settings])
    (one,) = run_processes(without_fsdp, 1, tmp_path / "1", tmp_path / "one", *given)
    two = run_processes(with_fsdp_of_transformers, 2, tmp_path / "2", tmp_path / "two", *given)
    for each in two:
        for expected, found in zip(one, each, strict=True):
            compare(expected, found, tmp_path / "one", tmp_path / "two", atol=1e-4)
            for tensor, other in zip(expected[2], found[2], strict=True):
                torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("other", ["fsdp_cpu_offload", "fsdp_mixed_precision"])
def test_further_settings_of_a_sharded_base_are_refused(other, monkeypatch):
    base = tiny_base()
    base._is_fsdp_managed_module = True
    base.config.distributed_config = DistributedConfig(**{other: True})
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    with pytest.raises(AttachError, match="leave the other settings out"):
        ShadowForCausalLM.from_base(base)


def test_a_base_that_only_the_first_process_has_is_refused(monkeypatch):
    monkeypatch.setattr(sharded_loading, "is_fsdp_enabled", lambda: True)
    with pytest.raises(AttachError, match="set it to false"):
        ShadowForCausalLM.from_base(tiny_base())
