"""Write the robot's data set: requests of CLINC150, each answered with an action or with [REMOTE].

python examples/robot/commands.py runs/robot/data
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from shadowtune.data.sources import load_rows

SOURCE = "clinc150-demo"
SPLITS = ("train", "validation", "test")
REMOTE = "[REMOTE]"
"""Answer to a request that is none of the actions: it defers the request to the cloud."""
ACTIONS = {
    "alarm": "set_alarm",
    "change volume": "set_volume",
    "directions": "show_route",
    "ingredients list": "list_ingredients",
    "pay bill": "pay_bill",
    "recipe": "show_recipe",
    "report lost card": "block_card",
    "schedule meeting": "add_meeting",
    "shopping list": "read_shopping_list",
    "shopping list update": "update_shopping_list",
    "smart home": "control_home",
    "tell joke": "tell_joke",
    "timer": "set_timer",
    "traffic": "check_traffic",
    "translate": "translate",
}
"""Intent -> action; every other intent is answered with ``REMOTE``."""


def commands(split: str, limit: int | None = None) -> Iterator[dict[str, str]]:
    """Yield at most ``limit`` examples of a split, with prompt and completion."""
    for row in load_rows(SOURCE, split, limit):
        yield {"prompt": row["prompt"], "completion": ACTIONS.get(row["completion"], REMOTE)}


def write_commands(directory: Path, limit: int | None = None) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = [json.dumps(row) + "\n" for row in commands(split, limit)]
        (directory / f"{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    write_commands(parser.parse_args().directory)
