"""`longring watch`: the state of a run, again and again until it ends."""

from __future__ import annotations

import json
import time
from collections import deque

from rich.console import Console
from rich.live import Live

from ..records import Record
from ..report.screen import event_line, screen, state_line
from ..report.state import Observer, RunState
from ..report.tail import Tail
from ..run_directory import RunDirectory

SHOWN_EVENTS = 4


def watch(run: RunDirectory, console: Console, *, every_s: float, once: bool, as_json: bool) -> int:
    """Show the state of a run every `every_s` seconds until it ends; with `once` or `as_json`, only now. Returns 0.

    On a terminal the screen is redrawn in place; elsewhere every change is printed as a line. Raises ValueError if
    there is no run.
    """
    observer, events = Observer(run), Tail(run.events_file)
    if as_json:
        print(json.dumps(observer.state().to_json(), indent=2))
        return 0
    if console.is_terminal and not once:
        _live(observer, events, console, every_s)
    else:
        _lines(observer, events, console, every_s, once)
    return 0


def _live(observer: Observer, events: Tail, console: Console, every_s: float) -> None:
    shown: deque[Record] = deque(maxlen=SHOWN_EVENTS)

    def look() -> RunState:
        shown.extend(events.read()[1])
        state = observer.state()
        live.update(screen(state, str(observer.run.path), list(shown)), refresh=True)
        return state

    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while look().going == "running":
            time.sleep(every_s)


def _lines(observer: Observer, events: Tail, console: Console, every_s: float, once: bool) -> None:
    state = observer.state()
    earlier = list(events.read()[1])
    console.print(screen(state, str(observer.run.path), earlier[-SHOWN_EVENTS:]), soft_wrap=False)
    while state.going == "running" and not once:
        time.sleep(every_s)
        before, state = state, observer.state()
        # After the state: once that says that the run has ended, all of its events are there.
        for event in events.read()[1]:
            console.print(event_line(event), markup=False, highlight=False, soft_wrap=True)
        # `idle_s` differs at every look.
        if (state.step, state.going, state.hangs) != (before.step, before.going, before.hangs):
            console.print(state_line(state), markup=False, highlight=False, soft_wrap=True)
