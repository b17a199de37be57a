"""The layer rule: imports go down, siblings never meet, third-party packages stay behind their fences."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "shadowtune"
LAYERS = [
    {"errors", "tables", "versions"},
    {"config"},
    {"core", "provenance", "compatibility"},
    {"attach", "models"},
    {"model", "data"},
    {"export", "peft"},
    {"serving"},
    {"training", "evaluation"},
    {"comparison", "integrations"},
    {"registration"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}
ALLOWED = {  # third-party package -> parts of ours that may import it
    "torch": set(LAYER_OF) - {"config", "errors", "tables", "versions"},
    "transformers": {
        "attach",
        "models",
        "model",
        "data",
        "training",
        "evaluation",
        "export",
        "peft",
        "comparison",
        "integrations",
        "serving",
        "compatibility",
        "registration",
        "__init__",
    },
    "triton": {"core"},
    "deepspeed": {"attach", "training"},
    "liger_kernel": set(),
    "accelerate": {"training"},
    "peft": {"model", "peft", "integrations"},
    "axolotl": {"integrations"},
    "swift": {"integrations"},
    "shadow_peft": set(),
    "torchao": {"model"},
    "bitsandbytes": {"model"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "matplotlib": {"evaluation", "comparison", "serving"},
    "rich": {"cli"},
    "tqdm": set(),
    "yaml": {"config"},
    "safetensors": {"model", "models", "training"},
    "huggingface_hub": {"model", "compatibility"},
    "tokenizers": {"models", "export"},
    "filelock": {"models", "training", "serving"},
    "psutil": {"provenance"},
    "submitit": {"comparison"},
    "trl": set(),
    "lm_eval": {"evaluation"},
    "gguf": {"export"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "xllamacpp": {"export"},
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving", "cli"},
    "annotated_types": {"config"},
    "pydantic": {"config", "serving", "integrations"},
    "pydantic_core": {"config", "serving"},
    "httpx2": {"serving"},
    "llguidance": {"serving"},
    "prometheus_client": {"serving"},
    "vllm": {"serving"},
}


def part_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return names


def faults(path: Path, text: str) -> list[str]:
    part, found = part_of(path), []
    for line, name in imported(ast.parse(text)):
        package, *rest = name.split(".")
        where = f"{path.relative_to(SOURCE.parent)}:{line}: "
        if package == "shadowtune":
            target = rest[0] if rest and rest[0] in LAYER_OF else "__init__"
            if target != part and LAYER_OF[target] >= LAYER_OF[part]:
                found.append(f"{where}{part} (layer {LAYER_OF[part]}) imports {target} (layer {LAYER_OF[target]})")
        elif package in ALLOWED and part not in ALLOWED[package]:
            found.append(f"{where}{package} is not allowed in {part}")
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_and_third_parties_stay_behind_their_fences(path):
    assert not faults(path, path.read_text()), "\n".join(faults(path, path.read_text()))


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("core/x.py", "from shadowtune.attach import attach"),
        ("model/x.py", "import shadowtune.data.sources"),
        ("export/x.py", "from shadowtune.evaluation.run import FinishedRun"),
        ("training/x.py", "from shadowtune.evaluation.run import FinishedRun"),
        ("evaluation/x.py", "from shadowtune.comparison.job import Job"),
        ("serving/x.py", "from shadowtune.training.run import train"),
        ("config/x.py", "import torch"),
        ("evaluation/x.py", "def f():\n    import peft"),
    ],
)
def test_the_rule_sees_what_breaks_it(place, line):
    assert faults(SOURCE / place, line)


def test_every_part_of_the_package_stands_on_a_layer():
    parts = {part_of(path) for path in SOURCE.rglob("*.py")}
    assert parts == set(LAYER_OF)


def test_nothing_below_the_command_line_prints_or_reads_arguments():
    for path in SOURCE.rglob("*.py"):
        if part_of(path) in ("cli", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno}"
            if isinstance(node, ast.Import):
                assert all(alias.name != "argparse" for alias in node.names), f"{path}:{node.lineno}"
