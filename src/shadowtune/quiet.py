"""Libraries that talk to their own developers while they are imported, kept quiet meanwhile."""

import contextlib
import logging
from collections.abc import Iterator

TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers that warn on import of parts that this machine does not need, or of what will change in torch."""


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Within this context these loggers pass on errors alone; what levels they had comes back."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in TALKATIVE}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
