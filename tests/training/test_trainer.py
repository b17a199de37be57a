import math

import pytest
import torch
from transformers import Trainer

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.config.training import LoraConfig
from shadowtune.data.collate import CausalCollator, ClassificationCollator, PackedCollator
from shadowtune.errors import CheckpointError, ConfigError, TrainingError
from shadowtune.model.methods import make_trainable, objective_of
from tests.support.bases import tiny_base, tiny_classifier
from tests.support.runs import Gradients, arguments, causal_rows, class_rows, snapshot, trainer_of
from tests.support.shadows import perturb

METHODS = ("shadow", "lora", "dora", "full")
SHADOW = ShadowConfig(rank=4, update_width=3, alpha=0.7, dropout=0.0, shadow_loss_weight=0.3)


def model_of(method="shadow", task="causal_lm", perturbed=True, shadow=SHADOW, **overrides):
    torch.manual_seed(0)
    base = tiny_classifier(**overrides) if task == "classification" else tiny_base(**overrides)
    model = make_trainable(base, method, task, shadow, LoraConfig(rank=2, alpha=2.0, dropout=0.0))
    return perturb(model, scale=0.1) if perturbed else model


def rows_of(task):
    return class_rows() if task == "classification" else causal_rows()


def whole_batch_gradients(model, method="shadow", task="causal_lm"):
    """Gradients of all rows as one batch, each loss a mean over all labels."""
    collate = ClassificationCollator(0) if task == "classification" else CausalCollator(0)
    model.train()
    loss = objective_of(method, task)(model, collate(rows_of(task)), None)["loss"]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
@pytest.mark.parametrize("method", METHODS)
def test_one_step_moves_every_trained_tensor_and_no_other(method, task, tmp_path):
    model = model_of(method, task)
    adapters = {"shadow": ("shadow",), "full": ("",)}.get(method, ("base_model.model.model.layers",))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith(adapters) or "score" in name for name in trained)
    assert method == "full" or not any(name.endswith("base_layer.weight") for name in trained)
    before = snapshot(model)
    trainer_of(model, arguments(tmp_path), rows_of(task), method, task).train()
    after = snapshot(model)
    still = {name for name in trained if torch.equal(before[name], after[name])}
    assert not still
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - trained)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("task", ["causal_lm", "classification"])
@pytest.mark.parametrize("method", METHODS)
def test_accumulated_batches_give_the_loss_and_gradients_of_one(method, task, accumulation, tmp_path):
    model = model_of(method, task)
    loss, expected = whole_batch_gradients(model, method, task)
    args = arguments(
        tmp_path,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
    )
    gradients = Gradients()
    trainer = trainer_of(model, args, rows_of(task), method, task, callbacks=[gradients])
    trainer.train()
    assert_same(gradients.first, expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_packed_batches_train_as_padded_ones_do(method, tmp_path):
    rows, runs = causal_rows(20), []
    for collate in (CausalCollator(0), PackedCollator()):
        model = model_of(method)
        args = arguments(
            tmp_path,
            max_steps=3,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            adam_epsilon=1e-4,  # the default scales rounding errors of tiny gradients up to whole steps
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=3,
        )
        trainer = trainer_of(model, args, rows, method, collate=collate, eval_dataset=rows[:3])
        trainer.train()
        names = ("loss", "base_loss", "shadow_loss", "eval_loss", "grad_norm")
        log = [{name: line[name] for name in names if name in line} for line in trainer.state.log_history]
        runs.append((log, trainer.progress().tokens, snapshot(model)))
    (padded_log, padded_tokens, padded), (packed_log, packed_tokens, packed) = runs
    assert packed_tokens == padded_tokens
    for packed_line, padded_line in zip(packed_log, padded_log, strict=True):
        assert packed_line == pytest.approx(padded_line, rel=1e-5)
    assert [line for line in packed_log if "eval_loss" in line]
    for name, tensor in padded.items():
        assert (packed[name] - tensor).abs().max() <= 1e-5, name


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_shadow_loss_arrives_under_a_plain_trainer(accumulation, tmp_path):
    model = model_of(perturbed=False)
    _, expected = whole_batch_gradients(model)
    args = arguments(tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)
    rows = [{name: value for name, value in row.items() if name != "row"} for row in causal_rows()]
    gradients = Gradients()
    Trainer(model=model, args=args, train_dataset=rows, data_collator=CausalCollator(0), callbacks=[gradients]).train()
    assert expected["shadow.backbone.norm.weight"].abs().max() > 1e-4  # W_up is 0: only the shadow's own loss gets here
    assert_same(gradients.first, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl 1.16 sets it
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("perturbed", [False, True])
def test_the_shadow_loss_arrives_under_trl(perturbed, accumulation, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.support.tokenizers import tiny_tokenizer

    model = model_of(perturbed=perturbed)
    _, expected = whole_batch_gradients(model)
    plain = arguments(tmp_path).to_dict()
    chosen = ("max_steps", "max_grad_norm", "save_strategy", "disable_tqdm", "use_cpu", "dataloader_pin_memory")
    args = SFTConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        **{name: plain[name] for name in chosen},
    )
    rows = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in causal_rows()])
    gradients = Gradients()
    SFTTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer(), callbacks=[gradients]
    ).train()
    assert expected["shadow.backbone.norm.weight"].abs().max() > 1e-4
    assert_same(gradients.first, expected)


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("method", ["shadow", "lora", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(method, kind, tmp_path):
    model = model_of(method)
    _, expected = whole_batch_gradients(model, method)
    args = arguments(
        tmp_path,
        per_device_train_batch_size=8,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": kind == "reentrant"},
    )
    gradients = Gradients()
    trainer_of(model, args, causal_rows(), method, callbacks=[gradients]).train()
    assert_same(gradients.first, expected)


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_gradient_checkpointing_of_a_pretrained_backbone(kind, tmp_path):
    from dataclasses import replace

    tiny_base(seed=5, hidden_size=16, intermediate_size=24).save_pretrained(tmp_path / "small")
    model = model_of(shadow=replace(SHADOW, backbone=str(tmp_path / "small")))
    _, expected = whole_batch_gradients(model)
    args = arguments(
        tmp_path,
        per_device_train_batch_size=8,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": kind == "reentrant"},
    )
    gradients = Gradients()
    trainer_of(model, args, causal_rows(), callbacks=[gradients]).train()
    assert_same(gradients.first, expected)


def test_a_compiled_model_trains_on_the_joint_loss(tmp_path):
    model = model_of(num_hidden_layers=2)
    _, expected = whole_batch_gradients(model)
    args = arguments(tmp_path, per_device_train_batch_size=8, torch_compile=True, torch_compile_backend="eager")
    gradients = Gradients()
    trainer_of(model, args, causal_rows(), callbacks=[gradients]).train()
    assert_same({name.removeprefix("_orig_mod."): g for name, g in gradients.first.items()}, expected)


def test_evaluating_before_training_changes_nothing(tmp_path):
    from dataclasses import replace

    results = []
    for evaluates in (False, True):
        model = model_of(shadow=replace(SHADOW, dropout=0.3))
        trainer = trainer_of(model, arguments(tmp_path, max_steps=3), causal_rows(), eval_dataset=causal_rows(4))
        if evaluates:
            before = snapshot(model)
            assert math.isfinite(trainer.evaluate()["eval_loss"])
            assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(model).items())
        torch.manual_seed(1)
        if evaluates:
            trainer.evaluate()
        trainer.train()
        results.append(snapshot(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_evaluation_loss_is_that_of_the_rows(tmp_path):
    model = model_of()
    loss, _ = whole_batch_gradients(model)
    args = arguments(tmp_path, per_device_eval_batch_size=8)
    trainer = trainer_of(model, args, causal_rows(), eval_dataset=causal_rows())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_two_terms_of_the_loss_are_logged_as_means_over_the_steps(tmp_path):
    model = model_of()
    args = arguments(tmp_path, max_steps=5, logging_steps=2, gradient_accumulation_steps=3, num_train_epochs=5)
    trainer = trainer_of(model, args, causal_rows())
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(line["base_loss"] + 0.3 * line["shadow_loss"], rel=1e-4)


def test_lambda_moves_to_its_end_over_the_steps(tmp_path):
    model = model_of(shadow=ShadowConfig(rank=4, update_width=3, shadow_loss_weight=0.2, shadow_loss_weight_end=1.0))
    trainer = trainer_of(model, arguments(tmp_path, max_steps=5, logging_steps=1, num_train_epochs=5), causal_rows())
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    weights = [(line["loss"] - line["base_loss"]) / line["shadow_loss"] for line in lines]
    assert weights == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-4)


def test_learning_rates_and_decay_reach_the_right_parameters(tmp_path):
    shadow = ShadowConfig(rank=4, update_width=3, hidden_size=16, update_bias=True, depth_sharing="full")
    model = model_of(shadow=shadow)
    args = arguments(tmp_path, learning_rate=0.01, weight_decay=0.1)
    optimizer = trainer_of(model, args, causal_rows(), backbone_learning_rate=0.001).create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found["shadow.backbone.layers.0.self_attn.q_proj.weight"] == (0.001, 0.1)
    assert found["shadow.backbone.norm.weight"] == (0.001, 0.0)
    assert found["shadow.projection.weight"] == found["shadow.input_projection.weight"] == (0.001, 0.1)
    for matrix in ("injection_downs", "injection_ups", "transform_downs", "transform_ups", "gate_downs", "gate_ups"):
        assert found[f"shadow.boundaries.{matrix}"] == (0.01, 0.1)
    vectors = ("transform_down_biases", "gate_up_biases", "norm_weight", "norm_bias", "boundary_scales")
    assert {found[f"shadow.boundaries.{vector}"] for vector in vectors} == {(0.01, 0.0)}


def test_a_backbone_learning_rate_of_zero_keeps_the_backbone(tmp_path):
    model = model_of()
    before = snapshot(model)
    trainer_of(model, arguments(tmp_path), causal_rows(), backbone_learning_rate=0.0).train()
    moved = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("shadow.boundaries.") for name in moved)


def poisoned(method="shadow"):
    """A model for which every row that holds token 96 has no number for a loss, and rows of which one does."""
    model = model_of(method)
    with torch.no_grad():
        model.get_input_embeddings().weight[96] = math.nan
    rows = [row for row in causal_rows(12) if 96 not in row["input_ids"]][:8]
    rows[5]["input_ids"][1] = 96
    return model, rows


@pytest.mark.parametrize("method", ["shadow", "lora"])
def test_a_loss_that_is_no_number_stops_training_and_names_the_rows(method, tmp_path):
    model, rows = poisoned(method)
    args = arguments(tmp_path, max_steps=20, save_strategy="steps", save_steps=1)
    args.train_sampling_strategy = "sequential"
    trainer = trainer_of(model, args, rows, method)
    with pytest.raises(TrainingError, match=rf"nan at step 3, training rows {rows[4]['row']}, {rows[5]['row']};"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)


def test_skipping_leaves_out_and_counts_the_steps_without_a_number(tmp_path):
    model, rows = poisoned()
    args = arguments(tmp_path, max_steps=8, logging_steps=1, max_grad_norm=1.0)
    args.train_sampling_strategy = "sequential"
    trainer = trainer_of(model, args, rows, skip_nonfinite=True)
    trainer.train()
    assert trainer.progress().skipped_steps == 2
    assert trainer.state.global_step == 8
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [loss == 0 for loss in losses] == [False, False, True, False] * 2
    assert trainer.state.log_history[2]["skipped_steps"] == 1


def test_a_skipped_step_changes_nothing(tmp_path):
    model, rows = poisoned()
    before = snapshot(model)
    args = arguments(tmp_path, weight_decay=0.5)
    trainer = trainer_of(model, args, rows[4:6], skip_nonfinite=True)
    trainer.train()
    assert trainer.progress().skipped_steps == 1
    after = snapshot(model)
    assert all(torch.equal(before[name], after[name]) for name in after if "embed" not in name)


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.shadow.boundaries.injection_downs[0, 0, 0] = math.inf
    trainer = trainer_of(model, arguments(tmp_path), causal_rows())
    with pytest.raises(TrainingError, match=r"shadow.boundaries.injection_downs holds NaN or infinite values"):
        trainer._save_checkpoint(model, None)
    assert not list((tmp_path / "out").iterdir())


def test_a_batch_without_labels_costs_nothing_and_is_no_error(tmp_path):
    model = model_of()
    before = snapshot(model)
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in causal_rows(2)]
    trainer = trainer_of(model, arguments(tmp_path, logging_steps=1), rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    after = snapshot(model)
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_checkpoints_hold_trained_tensors_alone_and_the_latest_are_kept(tmp_path):
    from safetensors.torch import load_file

    model = model_of()
    args = arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=1)
    trainer_of(model, args, causal_rows(), keep_checkpoints=3).train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"checkpoint-{n}" for n in (3, 4, 5)]
    saved = load_file(tmp_path / "out" / "checkpoint-5" / "model.safetensors")
    expected = {f"shadow.{name}": tensor for name, tensor in model.shadow.state_dict().items()}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("part", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_save_that_fails_midway_leaves_the_last_checkpoint_the_last(part, tmp_path, monkeypatch):
    trainer = trainer_of(
        model_of(), arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1), causal_rows()
    )
    original = getattr(Trainer, part)

    def fail(self, output_dir):
        if self.state.global_step == 3:
            raise OSError(28, "No space left on device")
        original(self, output_dir)

    monkeypatch.setattr(Trainer, part, fail)
    with pytest.raises(CheckpointError, match=r"checkpoint-3: .*No space left on device; checkpoints saved before"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_resuming_with_another_number_of_processes_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer_of(model_of(), args, causal_rows()).train()
    progress = tmp_path / "out" / "checkpoint-1" / "progress.json"
    progress.write_text(progress.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ConfigError, match=r"written by 2 process.* with 1"):
        trainer_of(model_of(), args, causal_rows()).train(resume_from_checkpoint=str(progress.parent))


def test_progress_counts_tokens_without_padding_and_goes_on_after_a_resumption(tmp_path):
    rows = causal_rows()
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = trainer_of(model_of(), args, rows)
    trainer.train()
    whole = trainer.progress()
    assert whole.tokens == sum(len(row["input_ids"]) for row in rows)
    resumed = trainer_of(model_of(), args, rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.progress().tokens == whole.tokens
    assert resumed.progress().seconds > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_low_precision_train_to_finite_numbers_in_the_chosen_precision(dtype, tmp_path):
    torch.manual_seed(0)
    model = ShadowForCausalLM.from_base(tiny_base().to(torch.bfloat16), SHADOW, dtype=dtype)
    before = snapshot(model)
    args = arguments(tmp_path, max_steps=3, bf16=True, logging_steps=1)
    trainer = trainer_of(perturb(model, scale=0.1), args, causal_rows())
    trainer.train()
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)
    after = snapshot(model)
    assert {tensor.dtype for name, tensor in after.items() if name.startswith("shadow.")} == {dtype}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.startswith("base."))


@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_another_loss_than_the_objective_is_refused(option, tmp_path):
    smoothed = {"label_smoothing_factor": 0.1} if option == "label_smoothing_factor" else {}
    function = {} if smoothed else {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()}
    with pytest.raises(ConfigError, match=f"{option} has no effect"):
        trainer_of(model_of(), arguments(tmp_path, **smoothed), causal_rows(), **function)


def test_b_of_lora_learns_faster_by_the_ratio_of_lora_plus(tmp_path):
    from shadowtune.config.training import LoraConfig

    model = make_trainable(tiny_base(), "lora", lora=LoraConfig(rank=2))
    args = arguments(tmp_path, learning_rate=0.01, weight_decay=0.1)
    optimizer = trainer_of(model, args, causal_rows(), "lora", lora_plus_ratio=16.0).create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[each]: group["lr"] for group in optimizer.param_groups for each in group["params"]}
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {rate for name, rate in found.items() if "lora_A" in name} == {0.01}
    assert {rate for name, rate in found.items() if "lora_B" in name} == {0.16}
