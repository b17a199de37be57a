from dataclasses import replace

import pytest

from benchmarks import runner
from benchmarks.__main__ import BENCHMARKS
from benchmarks.benchmark import BenchmarkPlan, Case
from benchmarks.runner import measure, open_candidate, prepare, run_benchmark
from benchmarks.training import TrainCandidate, TrainSettings
from shadowtune.comparison.worker_process import WorkerProcess
from shadowtune.errors import ConfigError, ShadowtuneError
from tests.benchmarks.in_process import ScriptedWorker

PLAN = BenchmarkPlan(
    {"shadow": {"size": 8}, "lora": {"size": 3}, "base": {"size": None}}, (Case("a", {}), Case("b", {}))
)
SETTINGS = TrainSettings(model="tiny", repeats=2)


@pytest.fixture
def worker(monkeypatch):
    def facts(count):
        return {"size": None, "trainable_parameters": count}

    class Worker(ScriptedWorker):
        log = []
        answers = {
            "shadow": (facts(100), 30.0, [4.0, 6.0, 3.0, 5.0]),
            "lora": (facts(102), 60.0, [2.0, 2.0, 3.0, 1.0]),
            "base": (facts(0), 10.0, [8.0, 6.0, 6.0, 5.0]),
        }

    monkeypatch.setattr(runner, "WorkerProcess", Worker)
    return Worker


def test_candidates_take_turns_in_every_round(worker):
    list(run_benchmark(BENCHMARKS["train"], SETTINGS, PLAN))
    turns = [name for method, name in worker.log if method == "measure"]
    assert turns == ["shadow", "lora", "base"] * 4
    assert worker.log[:3] == [("open", "shadow"), ("open", "lora"), ("open", "base")]
    assert worker.log[3:6] == [("prepare", "shadow"), ("prepare", "lora"), ("prepare", "base")]
    assert worker.log[12:15] == [("prepare", "shadow"), ("prepare", "lora"), ("prepare", "base")]


def test_each_case_yields_a_row_for_each_baseline_from_its_own_samples(worker):
    first, second = run_benchmark(BENCHMARKS["train"], SETTINGS, PLAN)
    assert [(row["case"], row["baseline"], row["ratio"]) for row in first] == [("a", "lora", 2.5), ("a", "base", 0.75)]
    assert [(row["case"], row["baseline"], row["ratio"]) for row in second] == [("b", "lora", 3.0), ("b", "base", 0.75)]
    assert [row["n"] for row in first] == [2, 2]
    assert [row["memory_ratio"] for row in first] == [0.5, 3.0]
    assert (first[0]["trainable_parameters"], first[0]["baseline_trainable_parameters"]) == (100, 102)
    assert (first[0]["model"], first[0]["batch"]) == ("tiny", 4)


def test_a_finished_case_is_handed_out_before_the_next_begins(worker):
    cases = run_benchmark(BENCHMARKS["train"], SETTINGS, PLAN)
    next(cases)
    assert sum(method == "prepare" for method, _ in worker.log) == 3


def test_unequal_budgets_are_refused_before_any_step(worker):
    worker.answers = {**worker.answers, "lora": ({"size": None, "trainable_parameters": 104}, 60.0, [])}
    with pytest.raises(ConfigError, match="shadow has 100 trainable parameters, but lora 104"):
        list(run_benchmark(BENCHMARKS["train"], SETTINGS, PLAN))
    assert {method for method, _ in worker.log} == {"open", "close"}


def test_every_worker_is_ended_whatever_happens(worker):
    worker.answers = {**worker.answers, "base": ({"size": None, "trainable_parameters": 0}, 10.0, [])}
    with pytest.raises(RuntimeError):
        list(run_benchmark(BENCHMARKS["train"], SETTINGS, PLAN))
    assert sorted(name for method, name in worker.log if method == "close") == ["base", "lora", "shadow"]


def test_progress_ends_at_its_total(worker):
    seen = []
    list(run_benchmark(BENCHMARKS["train"], SETTINGS, PLAN, lambda *state: seen.append(state)))
    assert seen[0] == ("load shadow", 0, 21)
    assert seen[-1] == ("b: base", 21, 21)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_candidate_works_in_its_own_process():
    settings = TrainSettings(model="tiny", batch=2, length=16)
    with WorkerProcess("lora", "try a smaller --batch") as own:
        opened = own.call(open_candidate, TrainCandidate, settings, "lora", {"size": 2})
        assert opened == {"size": "rank 2", "trainable_parameters": 2 * 4864, "facts": {}}
        wrong = replace(settings, model="./nowhere")
        with pytest.raises(ShadowtuneError, match=r"lora: cannot load the model ./nowhere"):
            own.call(open_candidate, TrainCandidate, wrong, "lora", {"size": 2})
        prepared = own.call(prepare, "lora", {"rows": 2, "length": 16, "labelled": 0.5})
        assert prepared["peak_memory_mb"] > 0
        assert prepared["size"] == opened["size"]
        assert own.call(measure, "lora") > 0
        assert own.call(measure, "lora") > 0
