"""Standard error that cannot fail: what it tells is not worth the work that it tells of."""

import contextlib
import io
import sys


class Unfailing(io.TextIOWrapper):
    """Drops what cannot be written, for instance because a log file's disk is full or its reader is gone."""

    def write(self, text: str) -> int:
        """Write the text, or do not."""
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do not."""
        with contextlib.suppress(OSError):
            super().flush()


def let_standard_error_fail() -> None:
    """Make this process go on when nothing can be written to standard error any more."""
    old = sys.stderr
    if isinstance(old, io.TextIOWrapper):
        encoding, errors = old.encoding, old.errors
        sys.stderr = Unfailing(old.detach(), encoding, errors, line_buffering=True)
