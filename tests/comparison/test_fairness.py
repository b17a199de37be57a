"""What a comparison must say, or refuse: tuning on named tasks, equal data, rows of others, missing methods."""

import json

import pytest

from shadowtune.comparison import execution, job
from shadowtune.comparison.analysis import Analysis
from shadowtune.comparison.plan import Plan
from shadowtune.comparison.report import conclusions
from shadowtune.comparison.run import compare, failures, rows_done
from shadowtune.comparison.tables import tables_of
from shadowtune.data.dataset import Dataset
from shadowtune.errors import ConfigError, ShadowtuneError
from tests.support.commands import ROWS, write_rows
from tests.support.comparisons import SHADOW, InventedWorker, LocalWorker, compare_config, compare_settings

RATE = "optimizer.learning_rate"


class Worker(InventedWorker):
    """Numbers of this file's tests."""


@pytest.fixture
def invented(monkeypatch):
    monkeypatch.setattr(execution, "WorkerProcess", Worker)
    monkeypatch.setattr(Worker, "failing", set())
    monkeypatch.setattr(Worker, "skill", staticmethod(lambda method, rate: 0.5))
    Worker.calls.clear()


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(execution, "WorkerProcess", LocalWorker)


def tasks(path, *names):
    words = compare_settings(path)["tasks"]["words"]
    return dict.fromkeys(names, words)


METHODS = {"base": None, "lora": {"lora": {"rank": 2}}, "shadow": {"shadow": SHADOW}}


class TestSweepOnNamedTasks:
    """Settings are tuned on two tasks and used on all."""

    @pytest.fixture
    def config(self, tmp_path):
        sweep = {"grid": {RATE: [1e-4, 1e-3, 1e-2]}, "tasks": ["a", "b"], "extend": 2, "finalists": 2}
        return compare_config(
            tmp_path, methods=METHODS, tasks=tasks(tmp_path, "a", "b", "c"), sweep=sweep, seeds=[1, 2, 3]
        )

    def test_trials_are_on_the_tuning_tasks_alone_and_the_winner_is_used_on_all(self, config, invented, monkeypatch):
        best = {"lora": 1e-3, "shadow": 0.1}
        monkeypatch.setattr(Worker, "skill", staticmethod(lambda name, rate: 0.8 - abs(rate - best.get(name, 0))))
        results = compare(Plan.of(config))
        trials = [row for row in results.rows if row["stage"] == "trial"]
        assert {row["task"] for row in trials} == {"a", "b"}
        finals = [row for row in results.rows if row["stage"] == "final" and row["training"]]
        assert {row["task"] for row in finals} == {"a", "b", "c"}
        assert {(row["method"], row["config"]["optimizer"]["learning_rate"]) for row in finals} == set(best.items())

    def test_every_method_has_the_same_protocol_and_the_report_shows_what_was_tried(
        self, config, invented, monkeypatch
    ):
        best = {"lora": 1e-3, "shadow": 0.1}
        monkeypatch.setattr(Worker, "skill", staticmethod(lambda name, rate: 0.8 - abs(rate - best.get(name, 0))))
        results = compare(Plan.of(config))
        # The grid of three on two tasks, then two settings with two further seeds; shadow's edge is extended.
        table = {
            row["method"]: row for row in tables_of(Analysis(config, results.rows), results)["Trials of the sweep"]
        }
        assert (table["lora"]["trials"], table["lora"]["beyond the grid"]) == (3 * 2 + 2 * 2 * 2, 0)
        assert (table["shadow"]["trials"], table["shadow"]["beyond the grid"]) == (5 * 2 + 2 * 2 * 2, 2)
        assert table["lora"]["tasks"] == "a, b"
        assert table["shadow"]["chosen"] == f"{RATE} 0.1"
        assert "0.1: 8" in table["shadow"]["accuracy % by setting"]
        assert {row["at an edge"] for row in table.values()} == {"no"}

    def test_an_edge_that_the_limit_leaves_is_said(self, config, invented, monkeypatch):
        monkeypatch.setattr(Worker, "skill", staticmethod(lambda name, rate: min(1.0, 0.2 * rate**0.2)))
        results = compare(Plan.of(config))
        said = conclusions(Analysis(config, results.rows), results)
        assert any("at the edge of what was tried: lora" in line and "shadow" in line for line in said)

    def test_trials_on_tuning_tasks_are_done_for_a_piece_that_leaves_these_out(self, tmp_path, config, invented):
        piece = compare_config(tmp_path, **{**vars_of(config), "only": ["c"]})
        results = compare(Plan.of(piece))
        assert {row["task"] for row in results.rows if row["stage"] == "trial"} == {"a", "b"}
        assert {row["task"] for row in results.rows if row["stage"] == "final"} == {"c"}
        done = len(Worker.calls)
        compare(Plan.of(config))
        assert {each.stage for each in Worker.calls[done:]} == {"final"}

    def test_no_test_row_is_read_before_every_trial_of_every_method_is_done(self, config, invented, monkeypatch):
        order, held_out, call = [], Dataset.held_out, Worker.call

        def read(dataset, split, source=None, limit=None):
            order.append(split)
            return held_out(dataset, split, source, limit)

        def trained(worker, function, *arguments):
            order.append(arguments[0].stage)
            return call(worker, function, *arguments)

        monkeypatch.setattr(Dataset, "held_out", read)
        monkeypatch.setattr(Worker, "call", trained)
        compare(Plan.of(config))
        assert "test" in order
        assert "trial" not in order[order.index("test") :]

    def test_a_method_of_which_all_trials_failed_is_a_failure(self, config, invented, monkeypatch):
        monkeypatch.setattr(Worker, "failing", {"lora"})
        rows = compare(Plan.of(config)).rows
        assert {row["method"] for row in rows if row["stage"] == "final"} == {"base", "shadow"}
        assert {row["method"] for row in failures(rows)} == {"lora"}

    def test_the_default_grid_has_five_rates_for_each_kind(self, tmp_path):
        sweep = {"grid": {RATE: "default"}}
        config = compare_config(tmp_path, methods={"lora": None, "full": None}, sweep=sweep)
        assert [trial[RATE] for trial in config.trials("lora")] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
        assert [trial[RATE] for trial in config.trials("full")] == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]

    @pytest.mark.parametrize(
        ("sweep", "said"),
        [
            ({"grid": {RATE: [1e-4, 1e-3]}, "extend": 1}, "three ascending numbers in grid"),
            ({"grid": {RATE: [1e-3, 1e-4, 1e-2]}, "extend": 1}, "three ascending numbers in grid"),
            ({"grid": {RATE: [0.0, 1e-4, 1e-2]}, "extend": 1}, "three ascending numbers in grid"),
            ({"grid": {RATE: [1e-4, 1e-3, 1e-2], "epochs": [1, 2, 3]}, "extend": 1}, "three ascending numbers"),
            ({"grid": {"epochs": "default"}}, "epochs must be a list of values"),
            ({"tasks": ["nowhere"]}, "sweep.tasks: there is no 'nowhere'"),
            ({"tasks": []}, "tasks must not be empty"),
            ({"finalists": 0}, "finalists must be at least 1"),
            ({"extend": -1}, "extend must be at least 0"),
        ],
    )
    def test_a_protocol_that_cannot_be_followed_is_one_line(self, tmp_path, sweep, said):
        with pytest.raises(ConfigError, match=said):
            compare_config(tmp_path, sweep=sweep)


def vars_of(config):
    return {"tasks": config.tasks, "methods": config.methods, "seeds": config.seeds, "sweep": vars(config.sweep)}


class TestRowsOfOthers:
    """Results of other rows or of another version are not mixed in."""

    def test_changed_training_rows_are_trained_on_anew_and_the_earlier_result_is_named(self, tmp_path, in_this_process):
        config = compare_config(tmp_path, methods={"lora": {"lora": {"rank": 2}}})
        (before,) = compare(Plan.of(config)).rows
        write_rows(tmp_path / "words" / "train.jsonl", [{**row, "completion": "zz"} for row in ROWS])
        results = compare(Plan.of(config))
        (after,) = results.rows
        assert after["rows"] != before["rows"]
        assert after["evaluations"][0]["loss"] != before["evaluations"][0]["loss"]
        assert results.left_out == [{"run": before["run"], "why": "made with other rows"}]
        said = conclusions(Analysis(config, results.rows), results)
        assert any(line.startswith("1 earlier results are left out: made with other rows") for line in said)

    def test_changed_test_rows_are_answered_anew_without_training(self, tmp_path, in_this_process):
        config = compare_config(tmp_path, methods={"lora": {"lora": {"rank": 2}}})
        (before,) = compare(Plan.of(config)).rows
        trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("model/*")}
        write_rows(tmp_path / "words" / "test.jsonl", [{**row, "completion": "zz"} for row in ROWS])
        (after,) = compare(Plan.of(config)).rows
        assert after["run"] == before["run"]
        assert after["evaluations"][0]["loss"] != before["evaluations"][0]["loss"]
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("model/*")} == trained

    def test_results_of_another_version_are_left_out_and_named(self, tmp_path, invented, monkeypatch):
        config = compare_config(tmp_path, methods={"lora": None})
        monkeypatch.setattr(job, "results_version", lambda: "0.0.9")
        compare(Plan.of(config))
        monkeypatch.undo()
        monkeypatch.setattr(execution, "WorkerProcess", Worker)
        assert rows_done(Plan.of(config)).rows == []
        results = compare(Plan.of(config))
        assert [row["version"] for row in results.rows] == [job.results_version()]
        assert [row["why"] for row in results.left_out] == ["made with version 0.0.9"]

    def test_rows_of_a_file_of_results_that_names_no_version_are_not_taken(self, tmp_path, invented):
        config = compare_config(tmp_path, methods={"lora": None})
        compare(Plan.of(config))
        file = tmp_path / "out" / "results.jsonl"
        row = json.loads(file.read_text())
        import shutil

        shutil.rmtree(tmp_path / "out" / "runs")
        old = {key: value for key, value in row.items() if key not in ("version", "rows", "columns")}
        file.write_text(json.dumps({**old, "run": "words/lora/seed-1-0ld0ld00"}) + "\n")
        results = compare(Plan.of(config))
        assert [row["run"] for row in results.rows] == [row["run"]]
        assert results.left_out == [{"run": "words/lora/seed-1-0ld0ld00", "why": "made with version unknown"}]

    def test_other_settings_are_another_run_and_not_named(self, tmp_path, invented):
        compare(Plan.of(compare_config(tmp_path, methods={"lora": {"lora": {"rank": 3}}})))
        assert compare(Plan.of(compare_config(tmp_path, methods={"lora": None}))).left_out == []

    def test_rows_are_read_once(self, tmp_path, monkeypatch):
        calls, rows = [], Dataset.training_rows
        monkeypatch.setattr(Dataset, "training_rows", lambda dataset: calls.append(1) or rows(dataset))
        digests = job.RowDigests()
        data = compare_config(tmp_path).train_config("words", "lora").data
        assert digests.training(data) == digests.training(data)
        assert digests.training(data)[1] == 8
        assert len(calls) == 1


class TestValidationRows:
    """Validation rows are part of every method's data or of none's."""

    SHADOW = {"shadow": {"shadow": SHADOW, "fit_logit_interpolation": True}}

    def test_a_method_that_alone_reads_them_is_shown_and_counted(self, tmp_path, invented):
        config = compare_config(tmp_path, methods={"lora": None, **self.SHADOW})
        results = compare(Plan.of(config))
        analysis = Analysis(config, results.rows)
        rows = {row["method"]: row for row in tables_of(analysis)["Rows that each method learns from"]}
        column = "validation rows read in training"
        assert (rows["lora"][column], rows["shadow"][column]) == (0, 8)
        assert (rows["lora"]["rows in all"], rows["shadow"]["rows in all"]) == (8, 16)
        assert any("(shadow 8; the others none): data are not equal" in line for line in conclusions(analysis))

    def test_all_methods_can_learn_them(self, tmp_path, in_this_process):
        config = compare_config(tmp_path, methods={"lora": {"lora": {"rank": 2}}, **self.SHADOW}, validation_rows="all")
        results = compare(Plan.of(config))
        assert [row["error"] for row in results.rows] == [None, None]
        analysis = Analysis(config, results.rows)
        rows = tables_of(analysis)["Rows that each method learns from"]
        assert {row["rows in all"] for row in rows} == {16}
        assert not any("data are not equal" in line for line in conclusions(analysis))
        lora = results.rows[0]["config"]["data"]
        assert (lora["learn_validation"], lora["validation"]) == (True, str(tmp_path / "words"))

    def test_trials_do_not_learn_the_rows_that_they_are_judged_by(self, tmp_path):
        config = compare_config(
            tmp_path,
            methods={"lora": None, **self.SHADOW},
            validation_rows="all",
            sweep={"grid": {RATE: [1e-3, 1e-2]}},
        )
        plan = Plan.of(config)
        assert {each.config.data.learn_validation for each in plan.trials()} == {False}
        finals = plan.finals({("words", "lora"): {}})
        assert {each.config.data.learn_validation for each in finals} == {True}

    def test_a_piece_learns_the_rows_of_the_whole(self, tmp_path):
        given = {"methods": {"lora": None, **self.SHADOW}, "validation_rows": "all"}
        whole, piece = (Plan.of(compare_config(tmp_path, **given, **only)) for only in ({}, {"only": ["lora"]}))
        jobs = {each.method: each for each in whole.finals()}
        (alone,) = piece.finals()
        assert alone.config.data.learn_validation
        assert (alone.config, alone.rows) == (jobs["lora"].config, jobs["lora"].rows)

    def test_without_a_reader_nothing_is_said(self, tmp_path, invented):
        config = compare_config(tmp_path)
        assert not any(
            "data are not equal" in line for line in conclusions(Analysis(config, compare(Plan.of(config)).rows))
        )


class TestWhatCannotBeCompared:
    """One line and a row of the report, never silence."""

    def test_a_baseline_that_is_not_installed_keeps_no_other_from_being_compared(self, tmp_path, invented, monkeypatch):
        from shadowtune.model import methods

        def missing():
            raise ShadowtuneError("methods lora, dora and peft need Hugging Face PEFT: pip install 'shadowtune[peft]'")

        monkeypatch.setattr(methods, "import_peft", missing)
        said = []
        config = compare_config(tmp_path)
        results = compare(Plan.of(config), said.append)
        assert [row["method"] for row in results.rows] == ["base", "shadow"]
        assert said[0].startswith("not compared: words, lora: methods lora, dora and peft need Hugging Face PEFT")
        (row,) = tables_of(Analysis(config, results.rows), results)["Not compared"]
        assert (row["method"], row["where"]) == ("lora", "everywhere")

    def test_a_method_without_a_size_within_the_budget_is_named_and_the_others_are_compared(self, tmp_path, invented):
        methods = {"base": None, "lora": None, "shadow": {"shadow": SHADOW, "size": "shadow.rank"}}
        config = compare_config(tmp_path, methods=methods, budget={"like": "shadow", "tolerance": 0.001})
        results = compare(Plan.of(config))
        assert {row["method"] for row in results.rows} == {"base", "shadow"}
        ((method, why),) = [(row["method"], row["why"]) for row in results.refused]
        assert method == "lora"
        assert why.startswith("budgets are not equal: shadow has ")

    def test_fewer_rows_than_asked_for_are_said(self, tmp_path, in_this_process):
        words = compare_settings(tmp_path)["tasks"]["words"]
        task = {"data": {**words["data"], "limit": 30}, "test_limit": 500}
        config = compare_config(tmp_path, tasks={"words": task}, methods={"lora": {"lora": {"rank": 2}}})
        results = compare(Plan.of(config))
        said = conclusions(Analysis(config, results.rows), results)
        assert "words: 8 training rows, fewer than the 30 asked for." in said
        assert "words: 8 test rows, fewer than the 500 asked for." in said

    def test_as_many_rows_as_asked_for_are_not_mentioned(self, tmp_path, in_this_process):
        words = compare_settings(tmp_path)["tasks"]["words"]
        task = {"data": {**words["data"], "limit": 8}, "test_limit": 8}
        config = compare_config(tmp_path, tasks={"words": task}, methods={"lora": {"lora": {"rank": 2}}})
        results = compare(Plan.of(config))
        assert not any("asked for" in line for line in conclusions(Analysis(config, results.rows), results))


class TestForgetting:
    """Perplexity of unrelated text before and after training."""

    @pytest.fixture
    def text(self, tmp_path):
        file = tmp_path / "text.jsonl"
        write_rows(file, [{"text": "the sea is red and the sun is on the ice " * 4}] * 3)
        return str(file)

    @pytest.mark.parametrize("method", ["lora", "shadow", "full", "lora-ensemble"])
    def test_each_run_has_the_loss_before_and_after(self, tmp_path, text, method, in_this_process):
        forgetting = {"text": text, "limit": 2, "length": 16}
        config = compare_config(tmp_path, methods={method: None}, forgetting=forgetting)
        results = compare(Plan.of(config))
        (row,) = results.rows
        assert row["error"] is None
        found = row["forgetting"]
        assert found["tokens"] == 30
        assert found["loss_before"] == pytest.approx(self.loss_of_base(config, text), rel=1e-4)
        assert abs(found["loss"] - found["loss_before"]) > 1e-3
        (shown,) = tables_of(Analysis(config, results.rows))["Forgetting"]
        assert shown["rise of the loss"] == f"{found['loss'] - found['loss_before']:+.3f}"

    @staticmethod
    def loss_of_base(config, text):
        import torch

        from shadowtune.config.data import DataConfig
        from shadowtune.model.methods import load_base
        from shadowtune.training.training_data import load_tokenizer

        model = load_base(config.common["model"]).eval()
        data = Dataset.open(DataConfig(train=text, block_size=16))
        tokenizer = load_tokenizer(config.common["model"])
        blocks = data.encode(data.training_rows(), tokenizer, classify=False, training=True)[0][:2]
        total = 0.0
        for block in blocks:
            ids = torch.tensor([block["input_ids"]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        return total / 30

    def test_another_text_is_measured_without_training(self, tmp_path, text, in_this_process):
        methods = {"lora": {"lora": {"rank": 2}}}
        settings = {"text": text, "limit": 2, "length": 16}
        (before,) = compare(Plan.of(compare_config(tmp_path, methods=methods, forgetting=settings))).rows
        trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("model/*")}
        write_rows(tmp_path / "text.jsonl", [{"text": "ice " * 40}])
        (after,) = compare(Plan.of(compare_config(tmp_path, methods=methods, forgetting=settings))).rows
        assert after["forgetting"]["loss"] != before["forgetting"]["loss"]
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("model/*")} == trained

    def test_a_text_that_is_not_there_fails_the_run_in_a_line(self, tmp_path, in_this_process):
        config = compare_config(tmp_path, methods={"lora": None}, forgetting={"text": str(tmp_path / "none.txt")})
        (row,) = compare(Plan.of(config)).rows
        assert "none.txt" in row["error"]
