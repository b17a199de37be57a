import json

import pytest

from shadowtune.cli.main import main


@pytest.fixture(scope="module")
def demo(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "demo"
    command = [
        "demo",
        "--model",
        str(base),
        "--output",
        str(output),
        "--rows",
        "32",
        "--test-rows",
        "12",
        "--epochs",
        "1",
    ]
    assert main(command) == 0
    return output, command


def test_demo_reports_base_lora_shadow_and_detached(demo):
    output, _ = demo
    document = json.loads((output / "report.json").read_text())
    assert (document["schema"], document["command"]) == (1, "demo")
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == ["base", "lora", "shadow", "shadow-detached"]
    assert rows["base"]["trainable_parameters"] == 0
    assert rows["base"]["train_seconds"] is None
    for name in ("lora", "shadow", "shadow-detached"):
        assert rows[name]["train_seconds"] > 0
        assert rows[name]["peak_memory_mb"] > 0
    assert len({rows[name]["loss"] for name in rows}) == 4
    assert all(row["tokens_per_second"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows.values())
    assert len(document["examples"]) == 3
    assert document["examples"][2]["expected"] == "out of scope"


def test_demo_draws_what_it_found(demo):
    output, _ = demo
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "shadow-detached" in page


def test_demo_again_trains_and_evaluates_nothing_anew(demo, capsys):
    output, command = demo
    kept = [*output.glob("*/summary.json"), *output.glob("*/evaluation-*.json")]
    assert len(kept) == 6
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert "trained already" in capsys.readouterr().err


def test_demo_with_other_settings_says_what_to_do(demo, capfd):
    _, command = demo
    assert main([*command, "--seed", "7"]) == 2
    assert "delete" in capfd.readouterr().err.splitlines()[-1]


def test_the_two_runs_train_equally_many_parameters_on_smollm2_sizes():
    import argparse

    from shadowtune.cli.demo import demo_configs
    from shadowtune.model.methods import make_trainable, trainable_parameters
    from tests.support.bases import tiny_base

    sizes = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }  # fmt: skip
    arguments = argparse.Namespace(output="o", model="m", rows=1, epochs=1.0, seed=0)
    counts = []
    for config in demo_configs(arguments).values():
        model = make_trainable(tiny_base(**sizes), config.method, config.task, config.shadow, config.lora)
        counts.append(trainable_parameters(model))
    assert abs(counts[0] / counts[1] - 1) < 0.03
