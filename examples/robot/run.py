"""Run the robot example: train one shadow, deploy it at the edge and in the cloud, calibrate and simulate the routing.

    python examples/robot/run.py            # about ten minutes on two cores
    python examples/robot/run.py --lora     # also with LoRA in the cloud, five minutes more
    python examples/robot/run.py --quick    # all steps on a few examples: nothing is learned

Each step is a shadowtune command, printed before it runs; a step whose output exists is skipped.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from commands import write_commands

from shadowtune.cli.main import main as shadowtune

HERE = Path(__file__).parent
QUICK = ("data.limit=24", "shadow_epochs=1", "epochs=1", "max_steps=4", "batch_size=8")
QUICK_EXAMPLES = 24
TARGET = ("--deferral-rate", "0.18")
"""Deferral rate: the 12 % open requests of the calibration split, and half as many that the robot is not sure of."""
LORA = ("method=lora", "lora.rank=15", "lora.alpha=30.0", "optimizer.learning_rate=1e-3", "shadow_epochs=0")
"""Settings of LoRA with as many trained parameters as the shadow."""


def main(argv: Sequence[str]) -> int:
    """Run all steps; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="directory of all output (default: runs/robot, quick: runs/robot-quick)")
    parser.add_argument("--model", help="base model (default: that of robot.yaml, SmolLM2-135M)")
    parser.add_argument("--lora", action="store_true", help="also train LoRA, as another model in the cloud")
    parser.add_argument("--quick", action="store_true", help="a few examples and steps")
    arguments = parser.parse_args(argv)
    output = Path(arguments.output or ("runs/robot-quick" if arguments.quick else "runs/robot"))
    if not (output / "data" / "test.jsonl").is_file():
        write_commands(output / "data", QUICK_EXAMPLES if arguments.quick else None)
    for result, command in steps(output, arguments.model, arguments.lora, arguments.quick):
        if result is not None and result.exists():
            continue
        print(f"$ shadowtune {shlex.join(command)}", flush=True)
        if code := shadowtune(command):
            return code
    return 0


def steps(output: Path, model: str | None, lora: bool, quick: bool) -> list[tuple[Path | None, list[str]]]:
    """Return each step's command, and the output by which it is skipped; None if it always runs."""
    shadow, detached, edge, policy = (output / name for name in ("shadow", "detached", "edge-int8", "policy.json"))
    settings = [f"data.train={output / 'data'}", *([f"model={model}"] if model else []), *(QUICK if quick else ())]
    train = ["train", str(HERE / "robot.yaml"), "--resume", *settings]
    calibrate = ["calibrate", str(edge), "--cloud-run", str(shadow), "--signal", "auto", *TARGET, "-o", str(policy)]
    calibrate += ["--answers", str(output / "calibration"), *(["--minimum", "0"] if quick else [])]
    simulate = ["simulate", "--edge", str(edge), "--cloud", str(shadow), "--policy", str(policy)]
    simulate += ["--arrivals", "closed:1", "--output", str(output / "simulation")]
    done: list[tuple[Path | None, list[str]]] = [
        (shadow / "summary.json", [*train, f"output={shadow}"]),
        (detached, ["detach", str(shadow), "--out", str(detached)]),
        (edge, ["export", str(detached), "--to", "onnx", "--quant", "int8", "--out", str(edge)]),
        (policy, calibrate),
    ]
    if lora:
        done.append((output / "lora" / "summary.json", [*train, f"output={output / 'lora'}", *LORA]))
        simulate += ["--lora", str(output / "lora")]
    return [*done, (None, simulate)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
