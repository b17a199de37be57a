"""Learning while serving: the draft head of one adapter is trained on its own answers while the engine is idle.

Verified tokens are the attached model's own, so they are the targets that drafts are judged by. A round trains a copy
of the head; the copy is adopted if its drafts agree with more of the held-out records, and given up again if drafts are
accepted less often afterwards. Only drafts depend on the head, so answers do not change. Everything here runs in the
engine's thread, between requests: a request waits for one step of training at most.
"""

import copy
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from shadowtune.core.draft_head import DraftHead, DraftVocabulary, draft_loss, unrolled_proposals
from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.errors import CheckpointError
from shadowtune.model.checkpoint import read_tensors, tensor_checksum, trained_tensors, write_tensors
from shadowtune.model.files import CONFIG, writing_into
from shadowtune.serving.engine.reservoir import Record, Reservoir, save_records

LOG = logging.getLogger(__name__)
MAX_BYTES = 64 * 2**20
"""Of the records of one adapter."""
MIN_TOKENS, MAX_TOKENS = 8, 256
"""Of a record."""
STEP_TOKENS = 64
"""Tokens of one step of training."""
ROUND_STEPS, MIN_RECORDS = 200, 10
"""Steps of a round, and records before the first one and between two."""
JUDGED_RECORDS = 50
"""Held-out records that decide on a round, at most."""
LEARNING_RATE = 1e-3
SAVE_SECONDS = 60.0
"""Between two saves: what a killed server loses."""
JUDGED_DRAFTS = 400
"""Verified drafts after which an adopted head is compared with the one before; until then no round begins."""


class DraftHeadLearner:
    """Trains the draft head of one adapter.

    Args:
        name: of the adapter, for the log.
        model: its attached model, with a draft head.
        directory: of its records and of the last head that was adopted.
        changed: called after the weights of the head have changed.

    Raises:
        CheckpointError: if the directory cannot be used, or another process uses it.
    """

    def __init__(self, name: str, model: Any, directory: Path, changed: Callable[[], None]) -> None:
        self._name, self._model, self._directory, self._changed = name, model, directory, changed
        self._head: DraftHead = model.shadow.draft_head
        self._steps: int = model.shadow.config.draft_steps
        self._targets = _Targets(DraftVocabulary(model.head, model.draft_vocabulary), model.base.dtype)
        self.enabled = True
        """False once something could not be written."""
        self.reservoir = Reservoir(MAX_BYTES)
        self._saving: threading.Thread | None = None
        self._round: _Round | None = None
        self._candidate: DraftHead | None = None  # trained in earlier rounds, and not better yet
        self._trained, self._saved, self._saved_at = 0, 0, time.monotonic()
        self._previous: dict[str, Tensor] | None = None
        self._counts, self._before = [0, 0], [0, 0]  # accepted and verified drafts: of this head, of the previous one
        self._lock = _locked(directory)
        self._load()

    def add(self, features: Tensor, states: Tensor, tokens: Sequence[int]) -> None:
        """Add a record of T generated tokens: features (T, n), s0 (T, d), their ids."""
        if self.enabled and len(tokens) >= max(MIN_TOKENS, self._steps + 3):
            self._save_records()  # a busy server is never idle
            kept, initial = (part[:MAX_TOKENS].to("cpu", torch.bfloat16).clone() for part in (features, states))
            self.reservoir.add(Record(kept, initial, torch.tensor(tokens[:MAX_TOKENS])))

    def observe(self, accepted: int, verified: int) -> None:
        """Count drafts; give an adopted head up if fewer are accepted than before, beyond chance."""
        self._counts[0] += accepted
        self._counts[1] += verified
        if self._previous is None or self._counts[1] < JUDGED_DRAFTS:
            return
        (now, count), (then, earlier) = self._counts, self._before
        share, fewer = (now + then) / (count + earlier), False
        if earlier > 0:
            error = (share * (1 - share) * (1 / count + 1 / earlier)) ** 0.5
            fewer = now / count < then / earlier - 2 * error
        if fewer:
            LOG.warning(
                "adapter %r: %.3f of the drafts are accepted since the last update of its draft head, %.3f before; "
                "it goes back",
                *(self._name, now / count, then / earlier),
            )
            self._set_weights(self._previous)
            self._candidate = None
            self._save_head()
        self._previous, self._before, self._counts = None, [0, 0], self._before if fewer else self._counts

    def step(self) -> bool:
        """Do one step of work, if there is any; return whether there may be more."""
        if not self.enabled:
            return False
        try:
            return self._work()
        except RuntimeError as error:  # torch's, such as a device without memory
            LOG.warning("adapter %r goes on without learning: %s", self._name, " ".join(str(error).split()))
            self.enabled = False
            return False

    def _work(self) -> bool:
        if self._round is None:
            new = self.reservoir.seen - self._trained
            if new < MIN_RECORDS or not self.reservoir.held_out or self._previous is not None:
                self._save_records()
                return False
            self._trained = self.reservoir.seen
            self._round = _Round(self._candidate or self._head, self._steps, self._targets, self._trained)
        if self._round.train(self.reservoir.training):
            return True
        if self._round.judge(self._head, self.reservoir.held_out):
            return True
        (before, after), total, trained = self._round.agreeing, self._round.total, self._round.head
        self._round, self._candidate = None, trained
        if after > before:
            self._candidate = None
            shares = after / total, before / total
            LOG.info("adapter %r: its draft head agrees with %.3f of held-out tokens, %.3f before", self._name, *shares)
            self._previous = {name: part.clone() for name, part in self._head.state_dict().items()}
            self._before, self._counts = self._counts, [0, 0]
            self._set_weights(trained.state_dict())
            self._save_head()
        return True

    def close(self) -> None:
        """Save the records, and let other processes use the directory."""
        if self._saving is not None:
            self._saving.join()
        self._save_records(at_once=True)
        if self._saving is not None:
            self._saving.join()
        self._lock.release()

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self._head.load_state_dict(weights)
        self._changed()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a saved head and saved records must have in common with this adapter."""
        others = trained_tensors({"shadow": self._model.shadow})
        others = {name: part.cpu() for name, part in others.items() if ".draft_" not in name}
        config = self._model.shadow.config
        return {
            "adapter": tensor_checksum(others),
            "base": self._model.config.base_fingerprint,
            "vocabulary": self._model.vocab_size,
            "draft_rank": config.draft_rank,
            "draft_layers": list(config.draft_layers or ()),
        }

    def _load(self) -> None:
        """Continue with the records and the head of an earlier process; what does not fit is left out, in one line."""
        head, records = self._directory / "head", self._directory / "records"
        try:
            if head.exists():
                self._check_origin(head)
                tensors = read_tensors(str(head))
                if {name: part.shape for name, part in tensors.items()} != {
                    name: part.shape for name, part in self._head.state_dict().items()
                } or not all(bool(part.isfinite().all()) for part in tensors.values()):
                    raise CheckpointError(f"{head} is damaged: it holds other tensors than this draft head")
                self._set_weights(tensors)
        except (CheckpointError, OSError, ValueError) as error:
            LOG.warning("adapter %r drafts with its own head: %s", self._name, error)
        try:
            if records.exists():
                self._check_origin(records)
                width = self._head.up.weight.shape[0]
                layers = len(self._model.shadow.draft_layers)
                self.reservoir.load(records, (1 + layers) * width, width)
        except (CheckpointError, OSError, ValueError) as error:
            LOG.warning("adapter %r begins without records: %s", self._name, error)
            self.reservoir = Reservoir(MAX_BYTES)
        self._trained = self._saved = self.reservoir.seen

    def _check_origin(self, directory: Path) -> None:
        """Check that a saved head or saved records are of this adapter.

        Raises:
            CheckpointError: if they are not.
            OSError, ValueError: if their config cannot be read.
        """
        if json.loads((directory / CONFIG).read_text()) != self._identity:
            raise CheckpointError(f"{directory} is of another base, adapter or vocabulary")

    def _save_head(self) -> None:
        def write() -> None:
            with writing_into(self._directory / "head") as staging:
                write_tensors(staging, self._head.state_dict())
                (staging / CONFIG).write_text(json.dumps(self._identity, indent=2) + "\n")

        self._write(write)

    def _save_records(self, at_once: bool = False) -> None:
        """Save new records, in a thread and at most every ``SAVE_SECONDS``, or at once."""
        running = self._saving is not None and self._saving.is_alive()
        due = at_once or (not running and time.monotonic() - self._saved_at >= SAVE_SECONDS)
        if not self.enabled or not due or self.reservoir.seen == self._saved:
            return
        self._saved, self._saved_at = self.reservoir.seen, time.monotonic()
        tensors, directory = self.reservoir.tensors(), self._directory / "records"
        self._saving = threading.Thread(
            target=self._write, args=(partial(save_records, tensors, directory, self._identity),), daemon=True
        )
        self._saving.start()

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (CheckpointError, OSError) as error:
            LOG.warning("adapter %r goes on without learning: %s", self._name, error)
            self.enabled = False


class _Targets(NamedTuple):
    """What drafts are trained on, and compared with."""

    vocabulary: DraftVocabulary
    dtype: torch.dtype
    """Of the base, in which the head gets its input."""

    def labels(self, record: Record, steps: int) -> Tensor:
        """Return labels (1, T) of a record: -100 for tokens that are never drafted, and for the first ones."""
        labels = self.vocabulary.labels(record.tokens).unsqueeze(0).clone()
        labels[:, : steps + 1] = IGNORE_INDEX  # whose drafts began before the record
        return labels


class _Round:
    """One round of training on a copy of the head.

    Args:
        head: to begin with.
        steps: drafts in a row.
        targets: of the drafts.
        seed: of the choice of records.
    """

    def __init__(self, head: DraftHead, steps: int, targets: _Targets, seed: int) -> None:
        self.head = copy.deepcopy(head).float().requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self.head.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self._steps, self._targets, self._left = steps, targets, ROUND_STEPS
        self.agreeing, self.total = (0, 0), 0
        """Held-out tokens that equal the drafts of the head before and of this one, and all that were compared."""
        self._judged = 0
        self._generator = torch.Generator().manual_seed(seed)

    def train(self, records: Sequence[Record]) -> bool:
        """Do one step, on a part of one record; return whether more are left."""
        if self._left == 0 or not records:
            return False
        self._left -= 1
        record = records[int(torch.randint(len(records), (), generator=self._generator))]
        start = int(torch.randint(max(1, len(record.tokens) - STEP_TOKENS + 1), (), generator=self._generator))
        part = Record(*(each[start : start + STEP_TOKENS] for each in record))
        labels, device = self._targets.labels(part, self._steps), self.head.up.weight.device
        with torch.enable_grad():
            features, states = (each.unsqueeze(0).to(device, self._targets.dtype) for each in part[:2])
            loss = draft_loss(
                self._targets.vocabulary.head, self.head, features, states, labels.to(device), self._steps
            )
            self._optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            self._optimizer.step()
        return True

    def judge(self, before: DraftHead, records: Sequence[Record]) -> bool:
        """Compare the heads on the beginning of one held-out record; return whether more are left."""
        if self._judged == min(len(records), JUDGED_RECORDS):
            return False
        record = Record(*(part[:STEP_TOKENS] for part in records[self._judged]))
        counts = [agreement(head, record, self._steps, self._targets) for head in (before, self.head)]
        self.agreeing = self.agreeing[0] + counts[0][0], self.agreeing[1] + counts[1][0]
        self.total, self._judged = self.total + counts[0][1], self._judged + 1
        return True


@torch.no_grad()
def agreement(head: DraftHead, record: Record, steps: int, targets: _Targets) -> tuple[int, int]:
    """Return how many tokens equal their draft, and how many there are, over all of ``steps`` drafts in a row."""
    agreeing = total = 0
    device = head.up.weight.device
    features, states = (part.unsqueeze(0).to(device, targets.dtype) for part in record[:2])
    labels = targets.labels(record, steps)[0, 1:].to(device)
    labelled = labels != IGNORE_INDEX
    for proposals in unrolled_proposals(head, features, states, steps):
        drafted = targets.vocabulary.head.apply(proposals[0, :-1]).argmax(-1)
        agreeing += int((drafted == labels)[labelled].sum())
        total += int(labelled.sum())
    return agreeing, total


def _locked(directory: Path) -> FileLock:
    """Return the lock of a directory, acquired.

    Raises:
        CheckpointError: if another process has it, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise CheckpointError(f"another server learns in {directory}; give this one a directory of its own") from None
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror or error}") from None
    return lock
