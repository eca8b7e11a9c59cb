"""One log file for each rank; the terminal is kept for what a person reads."""

from __future__ import annotations

import logging
from logging.handlers import MemoryHandler
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_held = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


def hold_warnings() -> None:
    """Keep warnings off the terminal, until `open_log` says where they go.

    megatron-core and DeepSpeed warn while they are imported, once on every rank, of optional parts that are absent.
    """
    logging.getLogger().addHandler(logging.NullHandler())  # until then, no log is the terminal either
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(_held)


def open_log(file: Path) -> None:
    """Send all logging of this process to `file`, held warnings first."""
    logging.raiseExceptions = False  # a log on a full disk is not worth a traceback on the terminal
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    _held.setTarget(handler)
    _held.flush()
    logging.getLogger("py.warnings").removeHandler(_held)
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.handlers.clear()
    deepspeed.propagate = True
