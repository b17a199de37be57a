"""Every baseline that has a name can be trained, by its name alone."""

import itertools

import pytest

from shadowtune.comparison import execution
from shadowtune.comparison.plan import Plan
from shadowtune.comparison.run import compare
from shadowtune.config.comparison import BASELINES, CompareConfig
from shadowtune.config.sweep import default_rates
from shadowtune.errors import ConfigError
from shadowtune.evaluation.run import FinishedRun
from shadowtune.model.methods import OWN_LOSS_TYPES, load_base, make_trainable, objective_of
from shadowtune.model.objective import causal_objective, own_causal_objective
from tests.support.comparisons import LocalWorker, compare_config
from tests.support.shadows import tokens

NAMES = ["lora", "dora", "full", *BASELINES]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(execution, "WorkerProcess", LocalWorker)


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_trains_by_its_name_and_leaves_a_model_that_differs_from_its_base(name, tmp_path):
    config = compare_config(tmp_path, methods={name: None, "base": None})
    (base, row) = compare(Plan.of(config)).rows
    assert row["error"] is None
    assert row["training"]["steps"] == 4
    assert row["training"]["trainable_parameters"] == Plan.of(config).sizes["words"][name].parameters > 0
    assert row["evaluations"][0]["loss"] != base["evaluations"][0]["loss"]


@pytest.mark.parametrize("name", NAMES)
def test_there_are_five_learning_rates_on_a_logarithmic_grid(name):
    rates = default_rates(name)
    assert len(rates) == 5
    assert all(2.9 < high / low < 3.5 for low, high in itertools.pairwise(rates))


def test_settings_of_a_method_win_over_those_of_the_baseline_that_it_names(tmp_path):
    config = compare_config(tmp_path, methods={"mine": {"method": "rslora", "peft": {"r": 3}}, "rslora": None})
    mine, plain = (config.train_config("words", name) for name in ("mine", "rslora"))
    assert (mine.method, mine.peft["r"], mine.peft["use_rslora"]) == ("peft", 3, True)
    assert plain.peft["r"] == 16
    assert config.kind("mine") == "peft"


def test_a_word_that_is_no_baseline_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean rslora"):
        compare_config(tmp_path, methods={"mine": {"method": "rslra"}})


def test_equal_parameters_are_found_for_every_baseline_with_a_size(tmp_path):
    names = [name for name in BASELINES if name != "lora-ensemble"]
    config = compare_config(tmp_path, methods=dict.fromkeys(names), budget={"parameters": 20000, "tolerance": 0.2})
    sizes = Plan.of(config).sizes["words"]
    assert {name: size.refused for name, size in sizes.items() if size.refused} == {}
    assert all(abs(size.parameters - 20000) <= 0.2 * 1.2 * 20000 for size in sizes.values())


def test_the_scale_of_rslora_and_of_alpha_32_stays_when_the_rank_is_chosen(tmp_path):
    config = compare_config(
        tmp_path, methods={"lora-alpha-32": None, "rslora": None}, budget={"parameters": 20000, "tolerance": 0.2}
    )
    plan = Plan.of(config)
    (wide, root) = plan.finals()
    assert wide.config.peft["lora_alpha"] == 32
    assert (root.config.peft["lora_alpha"], root.config.peft["use_rslora"]) == (16, True)
    assert wide.config.peft["r"] != 16


@pytest.mark.parametrize("peft_type", ["LORA", "MISS", "SHADOW", "ADALORA"])
def test_only_types_of_peft_with_terms_of_their_own_train_on_their_own_loss(peft_type):
    own = peft_type in OWN_LOSS_TYPES
    assert objective_of("peft", "causal_lm", peft_type) is (own_causal_objective if own else causal_objective)


def test_lora_by_peft_s_settings_is_the_same_training_as_lora(tmp_path):
    """So a baseline of PEFT is not slower or larger than LoRA for a reason that is ours."""
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": "all-linear"}
    methods = {
        "lora": {"lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0}},
        "peft": {"peft": settings},
    }
    lora, peft = compare(Plan.of(compare_config(tmp_path, methods=methods))).rows
    assert lora["evaluations"][0]["loss"] == peft["evaluations"][0]["loss"]
    assert lora["training"]["final_loss"] == peft["training"]["final_loss"]


class TestEnsemble:
    """LoRA with the logits of a separately trained small model."""

    @pytest.fixture
    def finished(self, tmp_path):
        common = {"shadow_epochs": 6.0, "optimizer": {"learning_rate": 3e-2}}
        config = compare_config(tmp_path, methods={"lora-ensemble": common})
        plan = Plan.of(config)
        (row,) = compare(plan).rows
        assert row["error"] is None
        (job,) = plan.finals()
        return FinishedRun.open(job.path), row, job

    def test_its_logits_are_those_of_both_models(self, finished):
        model, ids = finished[0].model, tokens(2, 7)
        model.gamma = 0.3
        large, small = model.large(input_ids=ids).logits, model.small(input_ids=ids).logits
        assert (large - small).abs().max() > 0.1
        assert (model(input_ids=ids).logits - (large + 0.3 * small)).abs().max() < 1e-6

    def test_it_generates_what_its_logits_say_padded_or_not(self, finished):
        import torch

        model = finished[0].model
        model.gamma = 2.0
        prompts = [tokens(1, 5, seed=1)[0], tokens(1, 3, seed=2)[0]]
        expected = []
        for prompt in prompts:
            ids = prompt[None]
            for _ in range(4):
                with torch.no_grad():
                    ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1)[:, None]], 1)
            expected.append(ids[0, len(prompt) :].tolist())
        padded = torch.stack([prompts[0], torch.cat([torch.zeros(2, dtype=torch.long), prompts[1]])])
        mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        output = model.generate(input_ids=padded, attention_mask=mask, **settings)
        assert output[:, 5:].tolist() == expected
        plain = model.large.generate(input_ids=padded, attention_mask=mask, **settings)
        assert plain[:, 5:].tolist() != expected

    def test_without_its_adapters_it_is_the_base(self, finished):
        run, _, job = finished
        ids, base = tokens(1, 6), load_base(job.config.model)
        with run.mode("base") as model:
            assert (model(input_ids=ids).logits - base(input_ids=ids).logits).abs().max() < 1e-5
        assert (run.model(input_ids=ids).logits - base(input_ids=ids).logits).abs().max() > 1e-3

    def test_its_cost_is_that_of_both_trainings_and_the_fit(self, finished):
        _, row, job = finished
        training = row["training"]
        assert 0 < training["fit_seconds"] < training["train_seconds"]
        assert training["shadow_seconds"] + training["fit_seconds"] < training["train_seconds"]
        lora = make_trainable(load_base(job.config.model), "lora", lora=job.config.lora)
        alone = sum(p.numel() for p in lora.parameters() if p.requires_grad)
        assert training["trainable_parameters"] > alone
        assert row["validation_rows"] == 8

    def test_its_weight_is_the_best_of_those_tried_on_the_validation_rows(self, finished):
        from shadowtune.data.collate import CausalCollator
        from shadowtune.evaluation.evaluate import answer_loss
        from shadowtune.training.interpolation import GAMMAS

        run = finished[0]
        data = run.dataset
        encoded = data.encode(data.validation_rows(), run.tokenizer, classify=False, training=True)[0]
        chosen, losses = run.model.gamma, {}
        for gamma in GAMMAS:
            run.model.gamma = gamma
            losses[gamma] = answer_loss(run.model, encoded, CausalCollator(0), 8)
        assert chosen == min(losses, key=losses.get)

    def test_the_same_again_trains_nothing(self, finished, monkeypatch):
        from shadowtune.training.run import train
        from shadowtune.training.trainer import ShadowTrainer

        monkeypatch.setattr(ShadowTrainer, "training_step", lambda *_: pytest.fail("trains"))
        run = finished[0]
        assert train(run.config, resume=True, quiet=True).method == "ensemble"


def test_an_ensemble_without_rows_to_fit_its_weight_on_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"method=ensemble .* data\.validation"):
        compare_config(
            tmp_path,
            tasks={"words": {"data": {"train": str(tmp_path / "words")}}},
            methods={"lora-ensemble": None},
        )


def test_the_ensemble_of_a_task_fits_on_the_task_s_validation_rows():
    config = CompareConfig(tasks={"clinc150": None}, methods={"lora-ensemble": None})
    assert config.train_config("clinc150", "lora-ensemble").data.validation == "task"
