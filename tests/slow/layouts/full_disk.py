"""The command line in one process of a launch, of which process 1 has a full disk when it saves.

torchrun --nproc-per-node 2 -m tests.slow.layouts.full_disk train CONFIG --quiet
"""

import errno
import os
import sys

from shadowtune.cli.main import main
from shadowtune.training.trainer import ShadowTrainer


def refuse(self, directory: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        ShadowTrainer._save_rng_state = refuse
    sys.exit(main(sys.argv[1:]))
