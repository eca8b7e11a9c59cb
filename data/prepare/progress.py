"""Progress of the processes that prepare input shards: each writes it to a file, and one shows them all."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ..format.tokenizer_file import MAX_ENCODE_SECONDS
from .merge import ledger_file

PROGRESS_SECONDS = 0.5

SLOW_SECONDS = 60
"""Seconds without progress after which the document at work is named; it usually takes milliseconds."""


def progress_file(partial: Path, number: int) -> Path:
    """Return the file with the documents and tokens done of input shard `number`, and the document at work."""
    return partial / "work" / "progress" / f"{number:06d}"


@contextmanager
def written(file: Path, state: Callable[[], str]) -> Iterator[None]:
    """Write `state()` to `file` every PROGRESS_SECONDS and at the end.

    A thread does so, as the tokenizer may take long for one document.
    """
    file.parent.mkdir(exist_ok=True)

    def write(_: bool) -> None:
        with suppress(OSError):  # a full disk ends the preparation where it writes shards
            file.write_text(state(), encoding="utf-8")

    with _repeated(write, PROGRESS_SECONDS):
        yield


@contextmanager
def shown(partial: Path, numbers: Sequence[int], processes: int, progress: Progress) -> Iterator[None]:
    """Show the progress of the processes, which they write to files."""
    with _repeated(_Display(partial, numbers, processes, progress).update, 0.3):
        yield


@contextmanager
def _repeated(work: Callable[[bool], object], seconds: float) -> Iterator[None]:
    """Call `work(False)` every `seconds` in a thread, and `work(True)` at the end of the context."""
    stop = threading.Event()

    def repeat() -> None:
        finished = False
        while not finished:
            finished = stop.wait(seconds)
            work(finished)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Display:
    """A bar of input shards with the documents and tokens done; it names a document that is slow."""

    def __init__(self, partial: Path, numbers: Sequence[int], processes: int, progress: Progress) -> None:
        # Invariant: `_done` counts (documents, tokens) of the input shards that are no longer pending.
        self._pending, self._done = list(numbers), np.zeros(2, dtype=np.int64)
        self._tokens_before, self._started = 0, time.monotonic()
        self._slow = _Slow()
        self._partial, self._total, self._processes, self._progress = partial, len(numbers), processes, progress
        self._task = progress.add_task("tokenizing, cutting, writing", total=len(numbers), line="")

    def update(self, finished: bool) -> None:
        """Read what the processes have written, and show it; with `finished`, read what all of them have."""
        running = np.zeros(2, dtype=np.int64)
        # Tasks start in order, so the running ones are among the first pending.
        for number in self._pending[: None if finished else 2 * self._processes]:
            done = ledger_file(self._partial, number).exists()  # before the counts, which are then the last ones
            counts, at = _reported(progress_file(self._partial, number))
            if at and self._slow.has_become_slow(number, (*counts.tolist(), at), time.monotonic()):
                self._progress.console.print(
                    f"input shard {number}: no progress for {SLOW_SECONDS} s at {at} or soon after it; if there is "
                    f"none for {MAX_ENCODE_SECONDS} s, the preparation ends",
                    highlight=False,
                    markup=False,
                )
            if done:
                # The loop runs over a slice, a copy of the list.
                self._pending.remove(number)
                self._done += counts
            else:
                running += counts
        documents, tokens = (self._done + running).tolist()
        # Tokens done before this attempt do not count in its rate.
        self._tokens_before = self._tokens_before or tokens
        rate = (tokens - self._tokens_before) / (time.monotonic() - self._started)
        line = f"{documents:,} documents  {tokens:,} tokens  {rate:,.0f}/s"
        self._progress.update(self._task, completed=self._total - len(self._pending), line=line)


class _Slow:
    """Finder of input shards whose progress stays as it is for SLOW_SECONDS."""

    def __init__(self):
        self._since: dict[int, tuple[object, float]] = {}

    def has_become_slow(self, number: int, state: object, now: float) -> bool:
        """Return whether input shard `number` has been in `state` for SLOW_SECONDS; True once for each state."""
        known, since = self._since.setdefault(number, (state, now))
        if known != state:
            self._since[number] = state, now
        elif now - since > SLOW_SECONDS:
            self._since[number] = state, float("inf")
            return True
        return False


def _reported(file: Path) -> tuple[NDArray[np.int64], str]:
    """Return (documents, tokens) done of an input shard, int64 [2], and the document at work.

    They are zeros and an empty name while the file is absent or incomplete.
    """
    words = file.read_text(encoding="utf-8").split(maxsplit=2) if file.exists() else []
    if len(words) < 2:
        return np.zeros(2, dtype=np.int64), ""
    return np.array(words[:2], dtype=np.int64), "".join(words[2:])
