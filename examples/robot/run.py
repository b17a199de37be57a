"""A robot that answers what it can by itself: train once, deploy twice, and see what the cloud is still needed for.

    python examples/robot/run.py            # about ten minutes on two cores
    python examples/robot/run.py --lora     # and LoRA in the cloud beside it, five minutes more
    python examples/robot/run.py --quick    # a look at the steps: nothing is learned

Each step is one command of shadowtune, printed before it runs; a step whose files are there already is left out.
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
QUICK_ROWS = 24
AIM = ("--hand-over", "0.18")
"""Of the requests to calibrate on 12 % are open, of those to judge by 21 %: as much again for those it is unsure of."""
LORA = ("method=lora", "lora.rank=15", "lora.alpha=30.0", "optimizer.learning_rate=1e-3", "shadow_epochs=0")
"""As many trained parameters as the shadow has."""


def main(argv: Sequence[str]) -> int:
    """Do all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", help="directory of everything it makes (default: runs/robot, quick: runs/robot-quick)"
    )
    parser.add_argument("--model", help="base model (default: that of robot.yaml, SmolLM2-135M)")
    parser.add_argument("--lora", action="store_true", help="also train LoRA, and let it answer in the cloud")
    parser.add_argument("--quick", action="store_true", help="a few rows and steps")
    arguments = parser.parse_args(argv)
    place = Path(arguments.output or ("runs/robot-quick" if arguments.quick else "runs/robot"))
    if not (place / "data" / "test.jsonl").is_file():
        write_commands(place / "data", QUICK_ROWS if arguments.quick else None)
    for made, command in steps(place, arguments.model, arguments.lora, arguments.quick):
        if made is not None and made.exists():
            continue
        print(f"$ shadowtune {shlex.join(command)}", flush=True)
        if code := shadowtune(command):
            return code
    return 0


def steps(place: Path, model: str | None, lora: bool, quick: bool) -> list[tuple[Path | None, list[str]]]:
    """Return each step's command, and the file that it leaves; None if it is done every time."""
    shadow, detached, edge, policy = (place / name for name in ("shadow", "detached", "edge-int8", "policy.json"))
    settings = [f"data.train={place / 'data'}", *([f"model={model}"] if model else []), *(QUICK if quick else ())]
    train = ["train", str(HERE / "robot.yaml"), "--resume", *settings]
    calibrate = ["calibrate", str(edge), "--cloud-run", str(shadow), "--signal", "auto", *AIM, "-o", str(policy)]
    calibrate += ["--answers", str(place / "calibration")]
    simulate = ["simulate", "--edge", str(edge), "--cloud", str(shadow), "--policy", str(policy)]
    simulate += ["--arrivals", "closed:1", "--output", str(place / "simulation")]
    done: list[tuple[Path | None, list[str]]] = [
        (shadow / "summary.json", [*train, f"output={shadow}"]),
        (detached, ["detach", str(shadow), "--out", str(detached)]),
        (edge, ["export", str(detached), "--to", "onnx", "--quant", "int8", "--out", str(edge)]),
        (policy, calibrate),
    ]
    if lora:
        done.append((place / "lora" / "summary.json", [*train, f"output={place / 'lora'}", *LORA]))
        simulate += ["--lora", str(place / "lora")]
    return [*done, (None, simulate)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
