"""The report of a run: what it shows of finished, resumed and interrupted runs."""

import html
import json
import re

import pytest

from shadowtune.cli.main import main
from shadowtune.config.training import DataConfig, TrainConfig
from shadowtune.errors import CheckpointError
from shadowtune.evaluation.run_report import commands, draw_svg, loss_curves, write_run_report
from tests.support.commands import save_base, write_config, write_rows

CONFIG = TrainConfig(data=DataConfig(train="rows.jsonl"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a shadow-only stage and validation, from the command line."""
    folder = tmp_path_factory.mktemp("report")
    base, data = save_base(folder / "tiny"), write_rows(folder / "rows.jsonl")
    config = write_config(folder / "c.yaml", base, data, folder / "run <1>")
    settings = [f"data.validation={data}", "shadow_epochs=1", "eval_steps=2", "max_steps=4", "samples=2"]
    assert main(["train", str(config), "--quiet", *settings]) == 0
    return folder / "run <1>"


def test_training_leaves_a_page_with_curves_figures_samples_settings_provenance_and_commands(run):
    page = (run / "report.html").read_text()
    for heading in (
        "Shadow-only stage",
        "Training",
        "Losses",
        "Costs",
        "Sample answers",
        "Use the model",
        "Provenance",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 2
    for curve in ("attached, training", "attached, validation", "detached, training", "detached, validation"):
        assert f">{curve}</text>" in page
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {html.escape(line["attached"]) for line in samples} <= set(re.findall(r"<td>([^<]*)</td>", page))
    assert "finished after 4 steps" in page
    assert "generate &#x27;" in page  # a path with a space is quoted for the shell
    assert "<1>" not in page


def test_the_page_needs_no_network(run):
    page = (run / "report.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import|<script|https?://", page)


def test_a_run_that_has_not_finished_has_a_report_without_commands(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {train: rows.jsonl}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n')
    page = write_run_report(tmp_path).read_text()
    assert "not finished" in page
    assert "Use the model" not in page
    assert page.count("<polyline") == 1


def test_a_directory_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run directory"):
        write_run_report(tmp_path)


def test_curves_are_of_the_attached_and_the_detached_model_where_both_are_logged(tmp_path):
    lines = [
        {"step": 1, "loss": 3.0, "base_loss": 2.0, "shadow_loss": 20.0},
        {"step": 2, "eval_loss": 2.5, "eval_base_loss": 1.5, "eval_shadow_loss": 15.0},
        {"step": 2, "train_loss": 9.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert loss_curves(tmp_path / "metrics.jsonl", CONFIG) == {
        "attached, training": [(1, 2.0)],
        "attached, validation": [(2, 1.5)],
        "detached, training": [(1, 20.0)],
        "detached, validation": [(2, 15.0)],
    }
    assert list(loss_curves(tmp_path / "metrics.jsonl", CONFIG, "drafting")) == ["model, training", "model, validation"]


@pytest.mark.parametrize(
    "curve", [[(1, 2.0)], [(1, 2.0), (2, 2.0)], [(1, 900.0), (5, 0.01)], [(1, 0.0), (2, -1.0)], [(3, 1e-7), (4, 2e-7)]]
)
def test_any_curve_can_be_drawn_within_the_picture(curve):
    picture = draw_svg({"model, training": curve}, "loss")
    points = re.search(r'points="([^"]*)"', picture)[1]
    numbers = [float(number) for number in re.split("[ ,]", points)]
    assert all(0 <= x <= 760 for x in numbers[::2])
    assert all(0 <= y <= 260 for y in numbers[1::2])


def test_the_commands_are_those_that_the_method_has(tmp_path):
    def names(**settings):
        found = commands(TrainConfig(data=CONFIG.data, **settings), tmp_path)
        return [command.split()[1] for _, command in found]

    assert names() == ["generate", "generate", "evaluate", "serve", "detach", "export"]
    assert names(method="lora") == ["generate", "evaluate"]
    assert names(task="classification") == ["evaluate"]
    assert names(stage="pretrain") == ["train", "detach", "export"]
