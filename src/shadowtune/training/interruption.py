"""Ctrl-C in training: after the step that it comes in, or at once if it comes again."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


class StopBetweenSteps(TrainerCallback):
    """Raises KeyboardInterrupt between two steps.

    Raised wherever the signal finds the interpreter, it can end in a callback of the garbage collector, which swallows
    it, and the run goes on.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take Ctrl-C within this context; in the main thread alone, for no other gets signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def _stop(self) -> None:
        if self.asked:
            raise KeyboardInterrupt

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Stop before a step, so after what followed the last one: its log, evaluation and checkpoint."""
        self._stop()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop within a step of several batches."""
        self._stop()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Stop within an evaluation."""
        self._stop()
