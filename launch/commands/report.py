"""`longring report`: the page of a run, once or again and again while the run goes on."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from ...data.files import write_text
from ..report.history import History
from ..report.page import page
from ..report.state import Observer
from ..run_directory import RunDirectory


def report(run: RunDirectory, out: Path | None, console: Console, *, follow_s: int = 0) -> int:
    """Write the page of a run into `out`, by default `report.html` in its directory; returns 0.

    With `follow_s` above 0, every `follow_s` seconds until the run ends, and the browser reads it as often. Raises
    ValueError if there is no run.
    """
    file = out or run.report_file
    observer, history = Observer(run), History(run)
    while True:
        # Before the history: once this says that the run has ended, the history has all of it.
        state = observer.state()
        history.update()
        refresh_s = follow_s if state.going == "running" else 0
        write_text(file, page(history, state, refresh_s))
        console.print(f"saved {file}, step {state.step} of {state.steps}", soft_wrap=True, highlight=False)
        if not refresh_s:
            return 0
        time.sleep(refresh_s)
