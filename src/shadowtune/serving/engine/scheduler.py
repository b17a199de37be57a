"""Which rows the next pass is over. Everything here runs in the engine's one thread."""

import logging
from collections import Counter, deque
from collections.abc import Sequence
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from shadowtune.model.speculation.draft import Draft
from shadowtune.serving.engine.counters import Counters
from shadowtune.serving.engine.drafting import Drafting
from shadowtune.serving.engine.limits import Limits
from shadowtune.serving.engine.logits import Logits
from shadowtune.serving.engine.networks import Known, Networks
from shadowtune.serving.engine.rows import Row
from shadowtune.serving.requests import RequestError

LOG = logging.getLogger(__name__)


class Scheduler:
    """Admits rows, reads their prompts and lets them speak, a step at a time.

    Args:
        networks: the base, and the shadows beside it.
        limits: how much at once.
        counters: what it counts into.
    """

    def __init__(self, networks: Networks, limits: Limits, counters: Counters) -> None:
        self._networks, self._limits, self._counters = networks, limits, counters
        self._waiting: deque[Row] = deque()
        self._active: list[Row] = []

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._waiting or self._active)

    def add(self, row: Row) -> None:
        """Let a row wait for its turn."""
        self._waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Stop answering a row; nothing happens if it has ended."""
        if self._remove(row):
            self._counters.cancelled += 1
            row.deliver(None)

    def fail(self, rows: Sequence[Row] | None, error: RequestError) -> None:
        """End rows by an error; None means all."""
        for row in [*self._waiting, *self._active] if rows is None else rows:
            if self._remove(row, wipe=True):
                self._counters.failed += 1
                row.deliver(error)
                row.deliver(None)

    @torch.no_grad()
    def step(self) -> None:
        """Read a part of the prompts that wait, and give each running answer its next tokens.

        What goes wrong in a pass ends the rows of that pass.
        """
        self._admit()
        if batch := self._prompts():
            with _FailingRows(self, batch):
                self._read(batch)
        for rows in self._networks.groups([row for row in self._active if row.begun]):
            with _FailingRows(self, rows):
                self._speak(rows)

    def _admit(self) -> None:
        """Admit waiting rows, those of the owner with the fewest active rows first.

        Where one owner holds all places, ``Limits.reserve`` more are there for owners that hold none.
        """
        limits = self._limits
        while self._waiting:
            held = self._held()
            row = min(self._waiting, key=lambda each: held[each.request.owner])  # of equals the first
            reserve = 0 if held[row.request.owner] else limits.reserve
            longest = max(each.room for each in (row, *self._active))
            too_large = limits.max_tokens is not None and longest * (len(self._active) + 1) > limits.max_tokens
            if len(self._active) >= limits.max_rows + reserve or too_large:
                break
            self._waiting.remove(row)
            self._networks.join(row)
            self._active.append(row)
        self._counters.running, self._counters.waiting = len(self._active), len(self._waiting)

    def _held(self) -> Counter[str]:
        """Active rows of each owner."""
        return Counter(row.request.owner for row in self._active)

    def _prompts(self) -> list[Row]:
        """The oldest row whose prompt is not read, of the owner with the fewest rows, and others with nearly as much to
        read that fit beside it.
        """
        limit, held = self._limits.prefill_tokens, self._held()
        pending = [row for row in self._active if not row.begun]
        pending.sort(key=lambda row: held[row.request.owner])
        if not pending:
            return []
        first, *others = self._networks.groups(pending)[0]
        sizes = {row: len(row.owed(limit)[0]) for row in (first, *others)}
        batch, width = [first], sizes[first]
        for row in others:
            wider = max(width, sizes[row])
            if 2 * min(sizes[row], *(sizes[one] for one in batch)) >= wider and wider * (len(batch) + 1) <= limit:
                batch.append(row)
                width = wider
        return batch

    def _read(self, rows: Sequence[Row]) -> None:
        """Read a part of the prompts, with the prediction where it is the last."""
        owed = [row.owed(self._limits.prefill_tokens) for row in rows]
        before = [row.cached for row in rows]
        accepted, _ = self._pass(rows, [tokens for tokens, _ in owed], [expected for _, expected in owed])
        for row, start, (tokens, expected), count in zip(rows, before, owed, accepted, strict=True):
            self._counters.prompt_tokens += len(tokens) - len(expected or ())
            if row not in self._active:
                continue
            if expected is None:
                row.cached = start + len(tokens)
                continue
            row.accepted = count
            self._counters.accepted_prediction_tokens += count
            self._counters.rejected_prediction_tokens += len(row.prediction) - count
            self._settle(row)

    def _speak(self, rows: Sequence[Row]) -> None:
        """Draft where it pays, and verify all rows in one pass."""
        drafts: list[tuple[Drafting, list[Row], Draft]] = []
        drafted: dict[Row, list[int]] = {}
        for adapter in dict.fromkeys(row.adapter for row in rows):
            own = [row for row in rows if row.adapter is adapter and row.request.speculate and row.left > 1]
            if adapter is not None and adapter.drafting is not None and own:
                run = partial(adapter.initial_states, own)
                with _FailingRows(self, own):
                    draft, said = adapter.drafting.draft(own, len(rows), run)
                    drafts.append((adapter.drafting, own, draft))
                    drafted |= zip(own, said, strict=True)
        rows = [row for row in rows if row in self._active]
        if not rows:
            return
        expected = [drafted.get(row, []) for row in rows]
        tokens = [[row.tokens[-1], *said] for row, said in zip(rows, expected, strict=True)]
        known = [(own, draft.states) for _, own, draft in drafts]
        results = dict(zip(rows, zip(*self._pass(rows, tokens, expected, known), strict=True), strict=True))
        for drafting, own, draft in drafts:
            if any(row not in self._active for row in own):
                continue  # what a failed row tells is not to be learned from
            accepted, gained = [results[row][0] for row in own], [results[row][1] for row in own]
            drafting.learn(draft, accepted, gained)
            for row, stood, got in zip(own, accepted, gained, strict=True):
                self._counters.drafts.add(len(drafted[row]), [stood], [got])
        for row in rows:
            if row in self._active:
                self._settle(row)

    def _pass(
        self,
        rows: Sequence[Row],
        tokens: Sequence[Sequence[int]],
        expected: Sequence[Sequence[int] | None],
        known: Known = (),
    ) -> tuple[list[int], list[int]]:
        """Run the networks over the next tokens of rows, and let those speak whose last ones are expected, not None.

        Returns:
            Of each row, how many of the expected tokens stand, and how many it said.
        """
        hidden = self._networks.run(rows, tokens, known)
        self._counters.passes += 1
        places, firsts = list[tuple[int, int]](), list[int]()
        for number, (line, ahead) in enumerate(zip(tokens, expected, strict=True)):
            firsts.append(len(places))
            places += [] if ahead is None else [(number, at) for at in range(len(line) - 1 - len(ahead), len(line))]
        states = _gather(hidden, places)
        logits = Logits(states, self._networks.head)
        accepted, said = [0] * len(rows), [0] * len(rows)
        for number, (row, first, ahead) in enumerate(zip(rows, firsts, expected, strict=True)):
            if ahead is None:
                continue
            before = len(row.tokens)
            with _FailingRows(self, [row]):
                accepted[number] = row.judge(logits, first, ahead)
            said[number] = len(row.tokens) - before
            if row not in self._active:
                continue
            if row.adapter is not None and row.adapter.feeds_back:
                row.previous = states[first + said[number] - 1]
        self._counters.completion_tokens += sum(said)
        return accepted, said

    def _settle(self, row: Row) -> None:
        """Hand on what a row has said, and let it go at its end."""
        piece = row.piece()
        if row.finish_reason is not None:
            self._remove(row)
            self._counters.finished += 1
        if piece is not None:
            row.deliver(piece)
        if row.finish_reason is not None:
            row.deliver(None)

    def _remove(self, row: Row, wipe: bool = False) -> bool:
        """Take a row out, wherever it is; return whether it was there. ``wipe`` if its states may hold NaN."""
        if row in self._waiting:
            self._waiting.remove(row)
        elif row in self._active:
            self._active.remove(row)
            self._networks.leave(row, wipe)
        else:
            return False
        self._counters.running, self._counters.waiting = len(self._active), len(self._waiting)
        return True


class _FailingRows:
    """A context whose errors end the rows of a pass and nothing else."""

    def __init__(self, scheduler: Scheduler, rows: Sequence[Row]) -> None:
        self._scheduler, self._rows = scheduler, rows

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, RequestError):  # a row's own, with its reason
            LOG.warning("a row failed: %s", error)
            self._scheduler.fail(self._rows, error)
            return True
        if not isinstance(error, Exception):
            return False
        LOG.error("a pass over %d rows failed", len(self._rows), exc_info=error)
        reason = f"the pass over this request failed ({type(error).__name__}); the server's log says more"
        self._scheduler.fail(self._rows, RequestError(reason, 500))
        return True


def _gather(hidden: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """Return (M, d) states at (row, column) places of (B, T, d)."""
    indices = torch.tensor(places, dtype=torch.long, device=hidden.device).view(-1, 2)
    return hidden[indices[:, 0], indices[:, 1]]
