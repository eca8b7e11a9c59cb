"""One log file for each rank, so that the terminal stays readable, and without secrets."""

from __future__ import annotations

import logging
import threading
from logging.handlers import MemoryHandler
from pathlib import Path

from ..redact import redact

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# No level of a record flushes it, and it keeps its records, even if it is full, until `open_log` gives it a target.
_held = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


class RedactingFormatter(logging.Formatter):
    """A formatter that leaves secrets out of messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return redact(super().format(record))


def hold_warnings() -> None:
    """Hold warnings back from the terminal until `open_log` opens a file for them.

    megatron-core and DeepSpeed warn on every rank, while they are imported, about absent optional parts.
    """
    logging.getLogger().addHandler(logging.NullHandler())  # or else logging would print to the terminal
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(_held)


def open_log(file: Path) -> None:
    """Send all logging of this process to `file`, beginning with the held warnings."""
    logging.raiseExceptions = False  # a log on a full disk is not worth a traceback on the terminal
    # TensorBoard's thread, for example, ends with one when its file is gone.
    threading.excepthook = lambda ended: logging.getLogger(__name__).error(
        "thread %s ended", ended.thread and ended.thread.name, exc_info=ended.exc_value
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(RedactingFormatter(FORMAT))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    _held.setTarget(handler)
    _held.flush()
    logging.getLogger("py.warnings").removeHandler(_held)
    # DeepSpeed 0.19 gives its logger a handler for stdout and switches propagation off.
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.handlers.clear()
    deepspeed.propagate = True
