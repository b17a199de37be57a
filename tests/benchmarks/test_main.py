import csv
import gc
import json
import sys

import pytest

from benchmarks import runner
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.methods import BASELINES
from tests.benchmarks.in_process import LocalWorker

SMALL = ("--model", "tiny", "--batch", "2", "--length", "16", "--repeats", "2", "--quiet")


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    """Each sample collects garbage; what was imported before need not be gone through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def local(monkeypatch):
    monkeypatch.setattr(runner, "WorkerProcess", LocalWorker)


def bench(tmp_path, *arguments):
    files = ("--out", str(tmp_path / "results"), "--json", str(tmp_path / "result.json"))
    code = main(["train", *SMALL, *files, *arguments])
    return code, json.loads((tmp_path / "result.json").read_text()) if code == 0 else None


def check_rows(rows):
    for row in rows:
        assert list(row)[:8] == ["bench", "case", "candidate", "baseline", "ratio", "ratio_low", "ratio_high", "n"]
        assert (row["candidate"], row["n"]) == ("shadow", 2)
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row[row["unit"]] > 0
        assert not any(isinstance(value, (dict, list)) for value in row.values())


def test_processes_measure_ours_against_the_base(tmp_path):
    code, result = bench(tmp_path, "--baselines", "base", "--labelled", "0.25")
    assert code == 0
    assert [(row["case"], row["baseline"]) for row in result["rows"]] == [("labelled=0.25", "base")]
    check_rows(result["rows"])
    assert result["rows"][0]["peak_memory_mb"] > 0


@pytest.mark.usefixtures("local")
def test_each_case_has_a_row_for_each_baseline(tmp_path, capsys):
    code, result = bench(tmp_path, "--baselines", "lora,base", "--labelled", "1.0,0.25")
    assert code == 0
    assert (result["schema"], result["command"]) == (1, "bench")
    assert {"commit", "date", "versions", "processor", "threads"} <= set(result["provenance"])
    assert [(row["bench"], row["case"], row["baseline"]) for row in result["rows"]] == [
        ("train", "labelled=1", "lora"),
        ("train", "labelled=1", "base"),
        ("train", "labelled=0.25", "lora"),
        ("train", "labelled=0.25", "base"),
    ]
    check_rows(result["rows"])
    assert "labelled=0.25" in capsys.readouterr().out


@pytest.mark.usefixtures("local")
@pytest.mark.parametrize(
    ("arguments", "unit", "compared", "trained"),
    [
        (
            ("boundary", "--tokens", "8", "--width", "16"),
            "operations_per_second",
            [
                (f"{way} tokens=8", baseline)
                for way in ("forward", "forward+backward")
                for baseline in ("reference", "copy")
            ],
            False,
        ),
        (
            ("decode", "--model", "tiny", "--prompt", "4", "--new", "2", "--batch", "1,2", "--baselines", "base"),
            "tokens_per_second",
            [("batch=1", "base"), ("batch=2", "base")],
            True,
        ),
        (
            ("memory", "--model", "tiny", "--lengths", "8,16", "--batch", "2", "--baselines", "lora,base"),
            "mb",
            [
                (f"{phase}, 2 x {length} tokens", baseline)
                for phase in ("train", "prompt")
                for length in (8, 16)
                for baseline in ("lora", "base")
            ],
            True,
        ),
        (
            ("scaling", "--model", "tiny", "--lengths", "8,16", "--depths", "2", "--ranks", "2,4", "--length", "8"),
            "steps_per_second",
            [(case, "lora") for case in ("tokens=8", "tokens=16", "depth=2", "rank=2", "rank=4")],
            True,
        ),
    ],
)
def test_boundaries_and_decoding_are_measured_and_kept(tmp_path, capsys, arguments, unit, compared, trained):
    files = ("--out", str(tmp_path), "--json", str(tmp_path / "result.json"))
    assert main([*arguments, "--repeats", "2", "--quiet", *files]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["case"], row["baseline"]) for row in rows] == compared
    check_rows(rows)
    assert {row["unit"] for row in rows} == {unit}
    assert all((row["trainable_parameters"] > 0) == trained for row in rows)
    assert ("we train" in " ".join(capsys.readouterr().out.split())) == trained
    with (tmp_path / f"{arguments[0]}.csv").open(newline="") as file:
        assert [(row["case"], row["baseline"]) for row in csv.DictReader(file)] == compared


@pytest.mark.usefixtures("local")
def test_the_detached_shadow_is_measured_with_its_sizes(tmp_path, capsys):
    small = ("--model", "tiny", "--prompt", "4", "--new", "2", "--repeats", "2", "--warm-up", "0", "--quiet")
    files = ("--out", str(tmp_path), "--json", str(tmp_path / "result.json"))
    assert main(["detached", *small, "--baselines", "attached,safetensors-f16", *files]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    compared = [(phase, baseline) for phase in ("prefill", "decode") for baseline in ("attached", "safetensors-f16")]
    assert [(row["case"], row["baseline"]) for row in rows] == compared
    assert {row["candidate"] for row in rows} == {"detached"}
    for row in rows:
        assert (
            row["baseline_disk_mb"] > row["disk_mb"]
            if row["baseline"] == "attached"
            else row["baseline_disk_mb"] < row["disk_mb"]
        )
    with (tmp_path / "detached.csv").open(newline="") as file:
        assert [float(row["baseline_disk_mb"]) for row in csv.DictReader(file)] == [
            row["baseline_disk_mb"] for row in rows
        ]
    assert "adapter" not in capsys.readouterr().out.split(":")[0]


@pytest.mark.usefixtures("local")
def test_every_baseline_is_measured_at_an_equal_budget_and_kept(tmp_path):
    code, result = bench(tmp_path, "--labelled", "0.25")
    assert code == 0
    assert [row["baseline"] for row in result["rows"]] == list(BASELINES)
    for row in result["rows"]:
        if row["baseline"] != "base":
            assert row["baseline_trainable_parameters"] == pytest.approx(row["trainable_parameters"], rel=0.03)
    with (tmp_path / "results" / "train.csv").open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert [row["baseline"] for row in kept] == list(BASELINES)
    assert [float(row["ratio"]) for row in kept] == [row["ratio"] for row in result["rows"]]


@pytest.mark.usefixtures("local")
def test_a_second_run_adds_to_the_first(tmp_path):
    bench(tmp_path, "--baselines", "base", "--labelled", "1.0")
    before = {path: path.read_text() for path in (tmp_path / "results").iterdir()}
    bench(tmp_path, "--baselines", "base", "--labelled", "1.0")
    assert {path.name for path in before} == {"train.csv", "train.md"}
    for path, text in before.items():
        assert path.read_text().startswith(text)
        assert len(path.read_text()) > len(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--baselines", "lora,peft-shadw"), "unknown baseline 'peft-shadw' (did you mean peft-shadow?)"),
        (("--parameters", "10"), "shadow cannot have 10 trainable parameters"),
        (("--labelled", "2"), "labelled must be shares above 0 and up to 1"),
        (("--repeats", "0"), "repeats must be at least 1"),
        (("--model", "./nowhere"), "cannot load the model ./nowhere"),
        (("--length", "100000"), "length 100000 exceeds"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_leaves_no_file(tmp_path, capsys, arguments, said):
    assert bench(tmp_path, *arguments)[0] == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_budget_that_a_baseline_cannot_meet_is_refused_with_the_counts(tmp_path, capsys):
    assert bench(tmp_path, "--baselines", "lora,base", "--parameters", "26500")[0] == 2
    assert "shadow has 25,920 trainable parameters, but lora 24,320; more than 3% apart" in capsys.readouterr().err


def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shadow_peft", None)
    assert bench(tmp_path, "--baselines", "shadow-peft")[0] == 2
    assert "pip install 'shadowtune[bench]'" in capsys.readouterr().err


def test_results_that_cannot_be_kept_stop_it_before_the_work(tmp_path, capsys):
    (tmp_path / "results").write_text("")
    assert bench(tmp_path, "--baselines", "base")[0] == 2
    assert "cannot write results" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["trian", "latency"])
def test_an_unknown_benchmark_names_those_that_there_are(capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        main([wrong])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "train" in error
    assert error.count("\n") == 1


def test_help_tells_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in (
        "--model",
        "--baselines",
        "--labelled",
        "--batch",
        "--length",
        "--repeats",
        "--device",
        "--dtype",
        "--out",
    ):
        assert option in text
    assert "(default: 1.0,0.25,0.02)" in text


def test_the_overview_lists_each_benchmark(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {bench.help}"[:40] in text for name, bench in BENCHMARKS.items())
