import json

import pytest
import torch
import yaml
from transformers import AutoConfig

from benchmarks.planning import PlanSettings, open_plan, plan_plan
from benchmarks.runner import open_candidate, prepare
from shadowtune.cli.main import main
from shadowtune.cli.plan import read_count
from shadowtune.comparison.worker_process import WorkerProcess
from shadowtune.config.shapes import shapes
from shadowtune.errors import ConfigError
from shadowtune.model.budget import shapeless_base
from tests.support.commands import write_config

BUDGET = "preset: recommended\n"


def plan(arguments, tmp_path, command="plan"):
    assert main([command, *map(str, arguments), "--json", str(tmp_path / "plan.json")]) == 0
    (row,) = json.loads((tmp_path / "plan.json").read_text())["rows"]
    return row


def test_a_config_is_planned_with_its_own_data_and_counts_what_training_trains(
    base, data, shadow_run, tmp_path, capsys
):
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run")
    row = plan([config], tmp_path)
    assert row["trained"] == json.loads((shadow_run / "summary.json").read_text())["trainable_parameters"]
    (time,) = row["times"]
    assert time["steps"] == 4
    assert time["seconds"] == pytest.approx(4 * time["step_seconds"])
    phases = {memory["phase"]: memory for memory in row["memory"]}
    assert list(phases) == ["training", "attached, reading prompts", "detached, reading prompts"]
    assert phases["training"]["optimizer"] == 8 * row["trained"]
    shown = capsys.readouterr().out
    assert "estimated" in shown
    assert "measured on this machine" in shown


def test_a_dry_run_prints_the_same_and_does_nothing(base, data, tmp_path):
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run")
    assert plan([config, "--dry-run"], tmp_path, "train")["memory"] == plan([config], tmp_path)["memory"]
    assert not (tmp_path / "run").exists()


def test_a_named_base_needs_no_download_and_is_sharded(tmp_path, capsys, monkeypatch):
    shape = {**shapes()["llama-3-70b"], "num_hidden_layers": 4}  # its width, and fewer blocks to count
    monkeypatch.setattr("shadowtune.training.planning.shapes", lambda: {"llama-3-70b": shape})
    common = [
        "llama-3-70b",
        "--length",
        16,
        "--rows",
        80,
        "--device",
        "t4",
        "base_dtype=bfloat16",
        "batch_size=1",
    ]
    one = plan(common, tmp_path)
    assert "does not fit into the 16 GiB of t4" in capsys.readouterr().out
    eight = plan([*common, "--devices", "8"], tmp_path)
    assert {stage["stage"]: stage["steps"] for stage in one["times"]} == {"shadow-only stage": 480, "joint stage": 80}
    weights = [row["memory"][1]["weights"] for row in (one, eight)]
    gathered = 2 * 1.6 * 2**30 + 2 * 128_256 * 8192  # two blocks and the head
    assert weights[1] == pytest.approx(weights[0] / 8 + gathered, rel=0.05)
    quantized = plan([*common, "base_quantization=nf4"], tmp_path)["memory"][1]["weights"]
    assert 0.5 < quantized / weights[0] < 0.8  # embeddings, head and shadow are whole


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
    ],
)
def test_named_bases_have_their_published_sizes(name, parameters):
    with torch.device("meta"):
        base = shapeless_base(AutoConfig.for_model(**shapes()[name]))
    assert sum(each.numel() for each in base.parameters()) == parameters


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "h10"], "did you mean h100"),
        (["--tflops", "100"], "--tflops goes with a device"),
        (["--device", "h100", "--tflops", "-1"], "above 0"),
        (["--length", "1"], "--length must be at least 2"),
        (["--labelled", "0"], "--labelled"),
        (["shadow.rnak=3"], "unknown key shadow.rnak"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, said, base, capsys):
    assert main(["plan", str(base), "--length", "8", *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_budget_sets_rank_and_backbone_and_is_kept(base, data, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run", BUDGET)
    out = ["--budget", "9k", "epochs=1", "shadow_epochs=1", "--quiet"]
    assert main(["train", str(config), *out]) == 0
    assert "budget: " in capsys.readouterr().err
    trained = json.loads((tmp_path / "run" / "summary.json").read_text())["trainable_parameters"]
    assert 0.97 * 9000 <= trained <= 9000
    shadow = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["shadow"]
    assert shadow["rank"] != 4 or shadow["intermediate_size"] is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "100"], "is too small"),
        (["--budget", "9M"], "more than the rule can use"),
        (["--budget", "many"], "takes a number of parameters"),
        (["--budget", "9k", "preset=paper"], "preset: recommended"),
        (["--minutes", "1e-7"], "is too short"),
        (["--minutes", "0"], "--minutes must be above 0"),
    ],
)
def test_what_cannot_be_met_is_refused(arguments, said, base, data, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run", BUDGET)
    assert main(["train", str(config), "--quiet", *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_processes_that_could_disagree_on_the_passes_are_refused(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run", BUDGET)
    assert main(["train", str(config), "--minutes", "5", "--dry-run"]) == 2
    assert "several would disagree" in capsys.readouterr().err


def test_minutes_set_the_passes(base, data, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run", BUDGET)
    assert main(["train", str(config), "--minutes", "100", "--dry-run"]) == 0
    assert "minutes: epochs 4, shadow_epochs 12" in capsys.readouterr().err


def test_numbers_of_parameters_are_read():
    assert [read_count(text) for text in ("4.5M", "900k", "1B", "1_000", "12")] == [4_500_000, 900_000, 10**9, 1000, 12]
    with pytest.raises(ConfigError, match="--budget"):
        read_count("0")


@pytest.mark.process
@pytest.mark.model
def test_the_memory_is_within_a_tenth_of_what_is_measured():
    settings = PlanSettings(models=("smollm2-135m:4", "smollm2-135m:8"), methods=("shadow",))
    estimate, cases = open_plan(settings, "estimate"), plan_plan(settings).cases
    with WorkerProcess("measured", "") as worker:
        worker.call(open_candidate, open_plan, settings, "measured", {})
        for case in cases:
            measured = worker.call(prepare, "measured", dict(case.values))
            assert estimate.prepare(case.values) == pytest.approx(measured["peak_memory_mb"], rel=0.1)
            assert estimate.trainable_parameters == measured["trainable_parameters"]
