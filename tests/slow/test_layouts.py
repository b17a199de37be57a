"""Every layout of two processes against one process, cell by cell; docs/scaling.md has the expected table.

The processes run on a CPU, tiny models, and Gloo. `pytest -m slow -s tests/slow/test_layouts.py` prints the table; the
rows of DeepSpeed are skipped where it is not installed.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shadowtune.config.loading import dump_config
from shadowtune.config.training import DataConfig, TrainConfig
from shadowtune.training.checkpoints import check_checkpoint
from shadowtune.training.run import train
from shadowtune.training.trainer import ShadowTrainer  # noqa: F401  (registers the model type)
from tests.slow.layouts import BEST, CELLS, CHECKS, LAYOUTS, SHADOW, Layout
from tests.support.runs import model_directory, rows_file, run_config
from tests.support.shadows import tokens

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "scaling.md"
COLUMNS = (*CELLS, *CHECKS)
DIES = {"rank": 1, "step": 5}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A directory with a tiny base, whose weights 4-bit floats can hold, and with the runs of one process."""
    path = tmp_path_factory.mktemp("layouts")
    model_directory(path / "model-causal_lm", hidden_size=64, intermediate_size=128)
    rows_file(path / "causal_lm.jsonl")
    others = (path / "causal_lm.jsonl").read_text().replace('"completion": "', '"completion": "and ')
    (path / "others.jsonl").write_text(others)
    for cell in CELLS:
        train(replace(settings(path, cell), output=str(path / f"one, {cell}")), quiet=True)
    return path


def settings(path: Path, cell: str) -> TrainConfig:
    rows = str(path / "causal_lm.jsonl")
    validation = rows if cell != BEST else str(path / "others.jsonl")
    common = {
        "shadow": SHADOW,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "keep_checkpoints": 3,
        "data": DataConfig(train=rows, validation=validation),
    }
    return run_config(path, **{**common, **CELLS[cell]})


def expected_table() -> dict[str, dict[str, str]]:
    """The rows of the table whose first column is "layout"."""
    lines = iter(TABLE.read_text().splitlines())
    names = next(cells(line)[1:] for line in lines if line.startswith("| layout |"))
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *outcomes = cells(line)
        rows[name] = dict(zip(names, outcomes, strict=True))
    return rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_all_layouts_and_columns():
    table = expected_table()
    assert list(table) == list(LAYOUTS)
    assert all(list(row) == list(COLUMNS) for row in table.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, workplace):
    layout = LAYOUTS[name]
    if importlib.util.find_spec(layout.needs) is None:
        pytest.skip(f"{layout.needs} is not installed")
    outcomes = measured(name, layout, workplace)
    print(f"\n| {name} | " + " | ".join(outcomes.values()) + " |")
    assert outcomes == expected_table()[name]


@pytest.mark.parametrize("name", ["DDP", "FSDP2, full state dict"])
def test_a_full_disk_in_one_process_is_one_line(name, tmp_path):
    rows_file(tmp_path / "causal_lm.jsonl")
    model_directory(tmp_path / "model-causal_lm")
    described = job(name, "train", tmp_path)
    done = start(["tests.slow.layouts.full_disk", "train", described["config"], "--quiet"], LAYOUTS[name])
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "shadowtune: error: " in line]
    assert len([line for line in errors if "No space left on device" in line]) == 1
    assert all("another process of the launch has ended" in line for line in errors if "No space" not in line)
    assert not any(f"[rank{rank}]: Traceback" in done.stderr for rank in range(2))
    assert not list((tmp_path / f"{name}, train" / "checkpoints").glob("checkpoint-*"))


def measured(name: str, layout: Layout, path: Path) -> dict[str, str]:
    """Run all cells of a layout; returns "exact", "refused", or what is wrong."""
    killed = job(name, "train", path, output=f"{name}, killed", die_at=DIES)
    done = launch([killed], layout, path)
    if done.returncode == 0:  # refused before the step in which a process dies
        assert outcomes_of(path)["train"].startswith("refused: ")
        return dict.fromkeys(COLUMNS, "refused")
    last = path / f"{name}, killed" / "checkpoints" / "checkpoint-4"
    check_checkpoint(last)
    assert not (path / f"{name}, killed" / "checkpoints" / "checkpoint-6").exists()
    jobs = [job(name, cell, path) for cell in CELLS]
    jobs.append({**killed, "name": "kill, resume", "resume": True, "die_at": None})
    if not (path / "from DDP").exists():
        launch([job("DDP", "train", path, output="from DDP", die_at=DIES)], LAYOUTS["DDP"], path)
    shutil.copytree(path / "from DDP", path / f"{name}, from DDP")
    jobs.append(job(name, "train", path, output=f"{name}, from DDP", resume=True) | {"name": "resume from DDP"})
    done = launch(jobs, layout, path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = outcomes_of(path)
    found = {cell: agrees(path / f"{name}, {cell}", path / f"one, {cell}", results[cell]) for cell in CELLS}
    whole = path / f"{name}, train"
    found["kill, resume"] = agrees(path / f"{name}, killed", whole, results["kill, resume"], 0.0)
    found["resume from DDP"] = agrees(path / f"{name}, from DDP", whole, results["resume from DDP"])
    found["save"] = same_files(whole, path / "one, train")
    found["reload"] = same_logits(whole, path / "one, train")
    return found


def job(layout: str, cell: str, path: Path, output: str | None = None, **more) -> dict:
    """One run of two processes with half of the batch each, as the worker reads it."""
    output = output or f"{layout}, {cell}"
    file = path / f"{output}.yaml"
    dump_config(replace(settings(path, cell), batch_size=1, output=str(path / output)), file)
    return {"name": cell, "config": str(file), **more}


def launch(jobs: list[dict], layout: Layout, path: Path) -> subprocess.CompletedProcess:
    """Run jobs in two processes."""
    (path / "jobs.json").write_text(json.dumps(jobs))
    (path / "outcomes.json").unlink(missing_ok=True)
    return start(["tests.slow.layouts.worker", str(path / "jobs.json"), str(path / "outcomes.json")], layout)


def start(module: list[str], layout: Layout) -> subprocess.CompletedProcess:
    """Run a module with its arguments in two processes; none may outlive the launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **layout.environment}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=1500)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and "\0".join(module) in command_line(pid)]
    assert not left
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def outcomes_of(path: Path) -> dict[str, str]:
    return json.loads((path / "outcomes.json").read_text())


def agrees(run: Path, reference: Path, outcome: str, tolerance: float = 1e-4) -> str:
    """Compare losses and trained weights of two finished runs."""
    if outcome != "done":
        return outcome.partition(":")[0] if outcome.startswith("refused") else outcome[-400:]
    for ours, theirs in zip(losses(run), losses(reference), strict=True):
        if abs(ours - theirs) > max(tolerance, 1e-6) * abs(theirs):
            return f"loss {ours} instead of {theirs}"
    weights, others = tensors(run), tensors(reference)
    if weights.keys() != others.keys():
        return f"tensors {sorted(weights.keys() ^ others.keys())[:3]} differ"
    worst = max(float((weights[name].float() - others[name].float()).abs().max()) for name in weights)
    return "exact" if worst <= tolerance else f"weights differ by {worst:.1e}"


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("loss", "eval_loss") if name in line]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model").glob("*model.safetensors")
    return load_file(file)


def same_files(run: Path, reference: Path) -> str:
    """Compare the files of the last checkpoints: names, tensors, and the optimizer's state."""
    ours, theirs = ({file.name: file for file in last(path).iterdir()} for path in (run, reference))
    states = {name for name in ours.keys() ^ theirs.keys() if not name.startswith("rng_state")}
    if states:
        return f"files {sorted(states)}"
    shapes = [
        {name: tensor.shape for name, tensor in load_file(f["model.safetensors"]).items()} for f in (ours, theirs)
    ]
    moments = [sizes(torch.load(files["optimizer.pt"], weights_only=True)) for files in (ours, theirs)]
    if shapes[0] != shapes[1] or moments[0] != moments[1]:
        return "other tensors"
    sizes_of = [files["optimizer.pt"].stat().st_size for files in (ours, theirs)]
    return "exact" if abs(sizes_of[0] - sizes_of[1]) < 0.02 * sizes_of[1] else f"optimizer.pt of {sizes_of} bytes"


def last(run: Path) -> Path:
    return run / "checkpoints" / "checkpoint-6"


def sizes(state: dict) -> dict:
    return {
        index: {name: tuple(torch.as_tensor(value).shape) for name, value in sorted(values.items())}
        for index, values in state["state"].items()
    }


def same_logits(run: Path, reference: Path) -> str:
    batch = tokens(2, 9)
    with torch.no_grad():
        ours, theirs, base = (
            AutoModelForCausalLM.from_pretrained(path / "model", **mode)(batch).logits
            for path, mode in ((run, {}), (reference, {}), (reference, {"mode": "base"}))
        )
    assert (theirs - base).abs().max() > 1e-3  # trained, not the identity
    worst = float((ours - theirs).abs().max())
    return "exact" if worst < 1e-3 else f"logits differ by {worst:.1e}"
