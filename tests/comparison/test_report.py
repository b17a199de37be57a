import json

import pytest

from shadowtune.comparison.analysis import Analysis
from shadowtune.comparison.report import conclusions, tables_of, write_report
from tests.comparison.test_analysis import config, find, rows
from tests.support.comparisons import result_row


@pytest.fixture
def analysis(tmp_path):
    """An analysis of runs whose metrics are on disk."""
    made = config(output=str(tmp_path), sweep={"grid": {"optimizer.learning_rate": [1e-3, 1e-2]}})
    found = rows()
    for row in found:
        directory = tmp_path / "runs" / row["run"]
        directory.mkdir(parents=True)
        if row["training"] is not None:
            lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found[1] = {**found[1], "size": "lora.rank 15", "setting": {"optimizer.learning_rate": 1e-3}}
    return Analysis(made, [*found, result_row("dora", [0.0], error="no <room>", evaluations=[])])


def test_the_verdict_says_who_is_better_by_how_much_and_who_is_not(analysis):
    first, *rest = conclusions(analysis)
    assert first.startswith("words: shadow is significantly better than base (+50.0 points, ")
    assert "lora (+15.0 points, +11." in first
    assert "; undecided against shadow-b (+0.0 points, -0.9 to +0.9)." in first
    assert any(line.startswith("words: detached, shadow is significantly worse than shadow-b (-50.0") for line in rest)
    assert not any("Few test rows" in line or "One seed" in line for line in rest)


def test_few_rows_and_a_single_seed_are_said():
    said = conclusions(Analysis(config(seeds=[1]), [result_row("lora", [1.0]), result_row("shadow", [0.0])]))
    assert any("Few test rows" in line and "words (1)" in line for line in said)
    assert any(line.startswith("One seed") for line in said)


def test_the_report_has_tables_of_everything_in_both_forms(analysis, tmp_path):
    said = write_report(analysis, tmp_path)
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    for text in (markdown, page):
        for heading in ("Results", "Against the best of the others", "Differences", "Settings", "Failed runs"):
            assert heading in text
        assert "lora.rank 15" in text
        assert "optimizer.learning_rate 0.001" in text
    assert all(sentence in markdown for sentence in said)
    assert "| words | shadow detached | 25.0 | " in markdown
    assert "no &lt;room&gt;" in page
    assert "no <room>" not in page
    assert page.count("data:image/png;base64,") == 4
    assert 'src="http' not in page


def test_runs_known_from_their_results_alone_are_reported_without_curves(tmp_path):
    said = write_report(Analysis(config(output=str(tmp_path)), rows()), tmp_path)
    assert said and (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 3


def test_several_sizes_of_two_kinds_are_drawn_over_their_parameters(analysis, tmp_path):
    analysis = Analysis(config(output=str(tmp_path)), analysis.all_rows)
    for row, parameters in zip(
        [row for row in analysis.rows if row["training"]], (10, 20, 30, 40, 50, 60), strict=False
    ):
        row["training"] = {**row["training"], "trainable_parameters": parameters}
    write_report(analysis, tmp_path)
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 5


def test_a_comparison_without_any_result_has_a_report_all_the_same(tmp_path):
    said = write_report(Analysis(config(), [result_row("lora", [0.0], error="no", evaluations=[])]), tmp_path)
    assert said == []
    assert "Failed runs" in (tmp_path / "report.md").read_text()
    assert "<img" not in (tmp_path / "report.html").read_text()


def test_without_a_sweep_nothing_is_said_of_one(tmp_path):
    found = [{**row, "size": "lora.rank 15"} if row["method"] == "lora" else row for row in rows()]
    write_report(Analysis(config(output=str(tmp_path)), found), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "## Sizes that the budget chose" in markdown
    assert "sweep" not in markdown
    assert "validation rows" not in markdown


def test_the_tables_agree_with_the_analysis(analysis):
    from shadowtune.comparison.tables import results_table, tables_of

    row = find(results_table(analysis), method="lora")
    assert (row["accuracy %"], row["rows x seeds"], row["trained"]) == ("60.0", "400 x 2", "1,000")
    assert find(tables_of(analysis)["Differences"], against="lora")["points"] == "+15.0"


def test_settings_are_said_to_be_of_the_sweep_only_where_one_chose_them(tmp_path):
    found = [{**row, "size": "lora.rank 15", "setting": {}} for row in rows()]
    tables = tables_of(Analysis(config(output=str(tmp_path)), found))
    assert not [heading for heading in tables if "sweep" in heading]
    assert all(row.keys() == {"task", "method", "size"} for row in tables["Sizes that the budget chose"])
    without = tables_of(Analysis(config(output=str(tmp_path)), rows()))
    assert not {"Sizes that the budget chose", "Settings that the sweep chose"} & without.keys()
