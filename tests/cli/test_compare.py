import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from shadowtune.cli.main import main
from shadowtune.comparison import execution
from shadowtune.config.loading import SHIPPED
from tests.support.commands import ROWS, write_rows
from tests.support.comparisons import LocalWorker, compare_settings


def write_settings(path, **changes):
    file = path / "compare.yaml"
    file.write_text(yaml.safe_dump(compare_settings(path, **changes), sort_keys=False))
    return file


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(execution, "WorkerProcess", LocalWorker)


def test_a_dry_run_shows_sizes_and_numbers_and_runs_nothing(tmp_path, capsys):
    budget = {"like": "shadow", "tolerance": 0.1}
    file = write_settings(tmp_path, budget=budget, sweep={"grid": {"epochs": [1, 2]}}, seeds=[1, 2, 3])
    result = tmp_path / "plan.json"
    assert main(["compare", str(file), "--dry-run", "--json", str(result)]) == 0
    shown = capsys.readouterr().out
    assert "4 trials on validation examples, then 7 runs with 10 evaluations" in shown
    assert "lora.rank" in shown
    rows = {row["method"]: row for row in json.loads(result.read_text())["rows"]}
    assert abs(rows["lora"]["trainable_parameters"] / rows["shadow"]["trainable_parameters"] - 1) <= 0.1
    assert not (tmp_path / "out").exists()


def test_a_plan_says_how_long_it_takes_what_may_come_on_top_and_reads_no_test_rows(tmp_path, capsys):
    sweep = {"grid": {"optimizer.learning_rate": [1e-3, 1e-2, 1e-1]}, "extend": 2, "finalists": 2}
    budget = {"like": "shadow", "tolerance": 0.1, "time": "lora", "memory": "lora"}
    file = write_settings(tmp_path, sweep=sweep, budget=budget, seeds=[1, 2])
    (tmp_path / "words" / "test.jsonl").unlink()
    result = tmp_path / "plan.json"
    assert main(["compare", str(file), "--dry-run", "--json", str(result)]) == 0
    shown = capsys.readouterr().out
    assert "10 trials on validation examples, then 5 runs" in shown
    assert "up to 4 trials more" in shown
    assert "up to 4 runs more, at equal time and memory" in shown
    assert "about " in shown.splitlines()[-1]
    rows = {row["method"]: row for row in json.loads(result.read_text())["rows"]}
    assert 0 < float(rows["base"]["minutes"]) < float(rows["lora"]["minutes"])
    assert not (tmp_path / "out").exists()


def test_a_plan_takes_its_times_from_runs_that_are_done(in_this_process, tmp_path, capsys):
    file = write_settings(tmp_path, methods={"lora": {"lora": {"rank": 2}}})
    assert main(["compare", str(file), "--quiet"]) == 0
    (final,) = (tmp_path / "out" / "runs").glob("*/*/*/final.json")
    final.write_text(json.dumps({**json.loads(final.read_text()), "seconds": 7200.0}))
    capsys.readouterr()
    assert main(["compare", str(file), "--dry-run", "seeds=[1, 2, 3]"]) == 0
    assert "about 6 h 00 min" in capsys.readouterr().out


def test_a_plan_whose_rows_cannot_be_read_says_so(tmp_path, capsys):
    file = write_settings(tmp_path, tasks={"gsm8k": None}, methods={"lora": None})
    assert main(["compare", str(file), "--data", str(tmp_path), "--dry-run"]) == 0
    assert "tasks whose data cannot be read are not included" in capsys.readouterr().out


def test_a_baseline_that_is_not_installed_ends_in_a_line_after_the_others_were_compared(
    in_this_process, tmp_path, capsys, monkeypatch
):
    from shadowtune.errors import ShadowtuneError
    from shadowtune.model import methods

    def missing():
        raise ShadowtuneError("needs Hugging Face PEFT")

    monkeypatch.setattr(methods, "import_peft", missing)
    file = write_settings(tmp_path)
    assert main(["compare", str(file), "common.max_steps=1"]) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "shadowtune: error: lora cannot be compared on words: needs Hugging Face PEFT"
    assert "Traceback" not in shown.err
    assert "words: shadow is " in shown.out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Not compared" in report
    assert "| words | lora | everywhere | needs Hugging Face PEFT |" in report


def test_a_comparison_leaves_results_reports_and_a_verdict(in_this_process, tmp_path, capsys):
    file = write_settings(tmp_path)
    result = tmp_path / "result.json"
    assert main(["compare", str(file), "common.max_steps=2", "--json", str(result)]) == 0
    shown = capsys.readouterr()
    assert "words: shadow is " in shown.out
    assert "[3/3] words/shadow" in shown.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"runs", "results.jsonl", "report.md", "report.html"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["training"] and row["training"]["steps"] for row in rows] == [None, 2, 2]
    document = json.loads(result.read_text())
    assert (document["command"], len(document["rows"])) == ("compare", 4)
    assert {row["against"] for row in document["differences"]} == {"base", "lora"}
    assert main(["compare", str(file), "common.max_steps=2", "--quiet"]) == 0
    assert "[" not in capsys.readouterr().err


def test_data_is_a_directory_of_the_tasks_data(tmp_path, capsys):
    file = write_settings(tmp_path, tasks={"gsm8k": None}, methods={"lora": None})
    assert main(["compare", str(file), "--data", str(tmp_path), "--dry-run"]) == 0
    from shadowtune.config.comparison import CompareConfig
    from shadowtune.config.loading import load_config

    made = load_config(CompareConfig, file, [f"directory={tmp_path}"])
    assert made.train_config("gsm8k", "lora").data.directory == str(tmp_path)


def test_a_newcomers_rows_become_a_report_in_one_command(in_this_process, base, tmp_path, monkeypatch):
    """The command at the head of the file that we ship, on a tiny base."""
    shipped = SHIPPED / "compare" / "users.yaml"
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl")
    write_rows(tmp_path / "test.jsonl", ROWS[:3])
    small = [f"common.model={base}", "common.max_steps=2", "seeds=[1]", "methods.dora.size=none"]
    small += ["methods.shadow.size=shadow.intermediate_size", "methods.shadow.shadow.rank=4", "budget.tolerance=0.3"]
    command = next(line for line in shipped.read_text().splitlines() if "shadowtune compare" in line).split()[3:]
    assert main(["compare", str(shipped), *command[1:], *small]) == 0
    report = (tmp_path / "runs" / "compare-mine" / "report.md").read_text()
    assert "| mine | shadow detached |" in report
    assert "3 x 1" in report


def test_one_file_of_rows_and_the_documented_task_become_a_report(in_this_process, base, tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    task = (root / "docs" / "comparing.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert len(task.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-task.yaml").write_text(task)
    write_rows(tmp_path / "tickets.jsonl", [{"text": f"no {i}", "team": "red"} for i in range(60)])
    settings = ["tasks.mine.data.task=my-task.yaml", "tasks.mine.data.train=", "budget=", "seeds=[1]"]
    settings += [f"common.model={base}", "common.max_steps=2", "methods={lora: , shadow: }"]
    assert main(["compare", str(SHIPPED / "compare" / "users.yaml"), *settings]) == 0
    rows = (tmp_path / "runs" / "compare-mine" / "results.jsonl").read_text().splitlines()
    tested = json.loads(rows[0])["evaluations"][0]["rows"]
    assert 1 <= tested < 20


def test_failed_runs_end_in_exit_code_2_after_the_report(in_this_process, tmp_path, capsys):
    file = write_settings(tmp_path)
    (tmp_path / "words" / "test.jsonl").unlink()
    assert main(["compare", str(file)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("shadowtune: error: 3 of 3 runs failed, the first one (")
    assert "Failed runs" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["common.epocs=1"], "unknown key common.epocs (did you mean epochs?)"),
        (["methods.lora.lora.rnak=1"], "unknown key methods.lora.lora.rnak (did you mean rank?)"),
        (["methods.x.method=lorra"], "did you mean lora"),
        (["common.model=./nowhere"], "./nowhere"),
        (["budget.parameters=3"], "cannot have 3 trainable parameters"),
        (["budget.like=shadw"], "did you mean shadow"),
        (["methods.p.method=peft", "methods.p.peft.peft_type=IA4"], "IA4"),
        (["methods.p.method=peft", "methods.p.peft={peft_type: LORA, rr: 3}"], "PEFT's LORA has no setting peft.rr"),
        (["seeds=3"], "seeds must be a list"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(arguments, said, tmp_path, capsys):
    file = write_settings(tmp_path)
    assert main(["compare", str(file), *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert lines[-1].startswith("shadowtune: error: ")
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def start():
    """Starts a process that hears Ctrl-C even where the tests run in the background, and is gone with the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = []

    def begin(command, **settings):
        started.append(subprocess.Popen(command, **settings))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
    signal.signal(signal.SIGINT, before)


def test_a_comparison_that_was_killed_goes_on_where_it_was(start, tmp_path):
    """Killed while its second run trains; the first run stays, the second goes on from its checkpoint."""
    lora = {"lora": {"rank": 2}, "max_steps": 100000, "save_steps": 2}
    file = write_settings(tmp_path, methods={"base": None, "lora": lora})
    command = [sys.executable, "-m", "shadowtune", "compare", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = start(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = tmp_path / "out" / "runs" / "words"
    while not list(runs.glob("lora/*/checkpoints/checkpoint-4")):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    (base,) = runs.glob("base/*/final.json")
    (run,) = runs.glob("lora/*")
    before = base.stat().st_mtime_ns
    assert not (run / "final.json").exists()
    again = start(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    first = again.stderr.readline()
    newest = max(int(path.name.split("-")[1]) for path in run.glob("checkpoints/checkpoint-*"))
    while max(int(path.name.split("-")[1]) for path in run.glob("checkpoints/checkpoint-*")) == newest:
        assert again.poll() is None
        time.sleep(0.05)
    again.send_signal(signal.SIGINT)
    _, said = again.communicate(timeout=120)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert "1 of 2 runs are done already" in first + said
    assert again.returncode == 130
    assert base.stat().st_mtime_ns == before
    assert steps[:4] == [1, 2, 3, 4]
    assert steps == sorted(set(steps))


def test_a_report_of_what_is_done_runs_nothing(in_this_process, tmp_path, capsys):
    file = write_settings(tmp_path)
    settings = [str(file), "common.max_steps=2"]
    assert main(["compare", *settings, "--report"]) == 2
    assert "is done with these settings; leave out --report" in capsys.readouterr().err
    assert main(["compare", *settings, "only=[base, shadow]"]) == 0
    capsys.readouterr()
    assert main(["compare", *settings, "--report"]) == 0
    assert "words: shadow is " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["base", "shadow"]
