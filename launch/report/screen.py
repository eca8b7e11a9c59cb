"""The state of a run on a terminal, and as one line."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..records import Record
from ..tables import plain_table
from .state import RunState, in_words

SHOWN_STEPS = 8
SHOWN_EVENTS = 4
SPARK = "▁▂▃▄▅▆▇█"
COLOURS = {"running": "green", "finished": "green", "stopped": "yellow", "not started": "yellow"}


def screen(state: RunState, name: str, events: list[Record]) -> RenderableType:
    """Return the state as text and tables, whole at 80 columns."""
    facts = plain_table(None, "", "", left=("",))
    facts.show_header = False
    facts.add_row("run", f"{escape(name)}, [{COLOURS[state.going]}]{state.going}[/]")
    if state.holder:
        facts.add_row("by", escape(state.holder))
    share = state.step / state.steps
    facts.add_row("step", f"{state.step:,} of {state.steps:,}, {share:.1%} {bar(share, 20)}")
    if state.recent:
        facts.add_row("tokens", f"{_number(state.recent[-1].get('tokens'))}")
        losses = [r["loss"] for r in state.recent if isinstance(r.get("loss"), float)]
        facts.add_row("loss", f"{_number(state.loss, '.3f')}  {sparkline(losses, 48)}")
        facts.add_row("rate", f"{_number(state.tokens_per_s, ',.0f')} tok/s, median of {len(state.recent)} steps")
    if state.held_out is not None:
        step, loss = state.held_out
        facts.add_row("held out", f"{loss:.3f} after step {step:,}")
    if state.going == "running" and state.seconds_left is not None:
        facts.add_row("left", in_words(state.seconds_left))
    saved = "none yet" if state.saved_step is None else f"step {state.saved_step:,} at {state.saved}"
    facts.add_row("checkpoint", escape(saved))
    facts.add_row("ranks", f"[red]{escape(state.pulse)}[/]" if state.hangs else escape(state.pulse))
    parts: list[RenderableType] = [facts]
    if state.recent:
        parts.append(steps_table(state.recent[-SHOWN_STEPS:]))
    parts += [Text(event_line(event), style="yellow") for event in events[-SHOWN_EVENTS:]]
    return Group(*parts)


def steps_table(steps: list[Record]) -> Table:
    """Return a table of steps."""
    table = plain_table(None, "step", "loss", "bucket", "cp", "grad norm", "rate", "ms", "tok/s", "outcome")
    for step in steps:
        table.add_row(
            _number(step.get("step")),
            _number(step.get("loss"), ".3f"),
            _number(step.get("bucket")),
            _number(step.get("cp")),
            _number(step.get("grad_norm"), ".3g"),
            _number(step.get("learning_rate"), ".2e"),
            _number(step.get("step_ms"), ",.0f"),
            _number(step.get("tokens_per_s"), ",.0f"),
            escape(str(step.get("outcome", ""))),
        )
    return table


def state_line(state: RunState) -> str:
    """Return the state as one line, for a pipe."""
    parts = [f"step {state.step}/{state.steps}"]
    if state.recent:
        last = state.recent[-1]
        parts += [
            f"loss {_number(state.loss, '.3f')}",
            f"{_number(state.tokens_per_s, ',.0f')} tok/s",
            f"bucket {last.get('bucket')}",
            f"cp {last.get('cp')}",
        ]
    if state.going == "running" and state.seconds_left is not None:
        parts.append(f"{in_words(state.seconds_left)} left")
    if state.saved_step is not None:
        parts.append(f"saved {state.saved_step}")
    return "  ".join([*parts, state.going if state.going != "running" else state.pulse])


def event_line(event: Record) -> str:
    """Return an event as one line."""
    return (
        f"{event.get('time', '')} step {event.get('step', '?')}, {event.get('event', '?')}: {event.get('message', '')}"
    )


def sparkline(values: list[float], width: int) -> str:
    """Return the last values as `width` bars from the lowest to the highest."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(SPARK) - 1) / (high - low) if high > low else 0.0  # equal values are the lowest bar
    return "".join(SPARK[round((value - low) * scale)] for value in shown)


def bar(share: float, width: int) -> str:
    """Return a bar of `share` in [0, 1]."""
    full = round(width * min(1.0, share))
    return "█" * full + "░" * (width - full)


def _number(value: object, form: str = ",") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"
