"""The page of a run: one HTML file that needs no server and no other file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from ...data.format.manifest import Manifest
from ...data.format.store import open_store
from ...data.inspect.ledger import ledger_table, sources_table
from ..grids.division import division
from ..records import Record
from ..settings import flat, to_tree
from ..tables import plain_table
from .evaluation_tables import left_out_tables, long_context_tables, parts_tables
from .figures import pictures, short
from .history import History
from .state import RunState, in_words

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_EVENTS = 100


@dataclass(frozen=True)
class HtmlTable:
    """A table of the terminal for a page."""

    title: str
    columns: list[str]
    left: list[bool]
    """Whether each column is left-justified."""
    rows: list[list[str]]


def html_table(table: Table) -> HtmlTable:
    """Return the text of a table whose cells are text with rich's markup."""
    columns = [[Text.from_markup(str(cell)).plain for cell in column.cells] for column in table.columns]
    return HtmlTable(
        str(table.title or ""),
        [str(column.header).replace("\n", " ") for column in table.columns] if table.show_header else [],
        [column.justify == "left" for column in table.columns],
        [list(row) for row in zip(*columns, strict=True)],
    )


def page(history: History, state: RunState, refresh_s: int = 0) -> str:
    """Return the page of a run as HTML; the browser reads it again every `refresh_s` seconds, if given."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    return template.render(
        name=str(history.run.path),
        state=state,
        refresh_s=refresh_s,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        tiles=_tiles(history, state),
        pictures=[picture._replace(svg=Markup(picture.svg)) for picture in pictures(history)],  # all else is escaped
        tables=[html_table(table) for table in _tables(history) if table.row_count],
        recipe={key: json.dumps(value) for key, value in flat(to_tree(history.recipe)).items()},
    )


def _tiles(history: History, state: RunState) -> list[tuple[str, str, str]]:
    """Return the name, value and note of each figure at the head of the page."""
    tiles = [("step", f"{state.step:,}", f"of {state.steps:,}, {state.step / state.steps:.1%}")]
    if not history.last:
        return tiles
    tiles.append(("tokens", short(history.last["tokens"]), f"{history.last['tokens']:,}"))
    if not math.isnan(history.loss):
        tiles.append(("loss", f"{history.loss:.3f}", "training, nats per token"))
    if len(bits := history.curves.curve("bits_per_byte").mean):
        tiles.append(("bits a byte", f"{bits[-1]:.3f}", "training, mean over the data's bytes"))
    if history.whole_evaluations:
        last = history.whole_evaluations[-1]
        tiles.append(
            ("held out", f"{last['loss']:.3f}", f"at step {last['step']:,}; unigram {last['unigram_loss']:.3f}")
        )
    if state.tokens_per_s is not None:
        tiles.append(("tokens/s", short(state.tokens_per_s), f"median of the last {len(state.recent)} steps"))
    tiles.append(("time in steps", in_words(history.seconds), f"starts: {len(history.starts)}"))
    if state.going == "running" and state.seconds_left is not None:
        tiles.append(("left", in_words(state.seconds_left), "at the mean of the last steps"))
    if state.saved_step is not None:
        tiles.append(("checkpoint", f"{state.saved_step:,}", minute(state.saved)))
    unchanged = {name: count for name, count in history.outcomes.items() if name != "good"}
    if unchanged:
        note = ", ".join(f"{count} {name}" for name, count in unchanged.items())
        tiles.append(("not good", f"{sum(unchanged.values()):,}", f"steps: {note}"))
    return tiles


def _tables(history: History) -> list[Table]:
    return [
        _buckets(history),
        *_memory(history),
        *_evaluation(history),
        *_trained(history),
        *_ledger(history),
        _starts(history),
        _events(history),
    ]


def _buckets(history: History) -> Table:
    """Return the table of the plan of each bucket beside the measurements."""
    times = _planned(history)
    planned = ("planned ms",) if times else ()
    columns = ("bucket", "cp", "grid", "steps", "tokens", "share", *planned, "median ms", "loss", "held out")
    table = plain_table("Buckets: the plan, and what was measured", *columns, left=("grid",))
    all_targets = max(1, history.targets.total())
    grids = _grids(history)
    held_out = {e["bucket"]: e["loss"] for e in (history.evaluations or [{"buckets": []}])[-1]["buckets"]}
    for length in history.lengths:
        bucket, losses = history.buckets.get(length), history.curves.curve(f"buckets/{length}/loss").mean
        parallel = history.recipe.parallel
        cp = parallel.context_parallel(length)
        named = parallel.cp.named_grid(cp) if cp > 1 else "one rank"
        targets = history.targets[length]
        table.add_row(
            f"{length:,}",
            str(cp),
            str(named or grids.get(length, "")),
            f"{bucket.steps:,}" if bucket else "",
            f"{targets:,}",
            f"{targets / all_targets:.1%}",
            *(_figure(1e3 * times.get(length, math.nan), ",.0f") for _ in planned),
            _figure(bucket.median_ms if bucket else math.nan, ",.0f"),
            f"{losses[-1]:.3f}" if len(losses) else "",
            _figure(held_out.get(length, math.nan), ".3f"),
        )
    return table


def _planned(history: History) -> dict[int, float]:
    """Return the seconds of a step that the last start has predicted, by bucket; none on devices without a sheet."""
    try:
        entries = history.starts[-1]["predicted"].items()
        return {int(length): float(entry["step_s"]) for length, entry in entries if entry["step_s"]}
    except (IndexError, KeyError, AttributeError, TypeError, ValueError):
        return {}


def _memory(history: History) -> list[Table]:
    """Return the memory that the last start predicted for a rank, by kind, beside the measured peak of its tensors."""
    try:
        entries = history.starts[-1]["predicted"].values()
        largest = max(entries, key=lambda entry: entry["memory_bytes"])
        kinds = {str(name): float(count) / 2**30 for name, count in largest["kinds_bytes"].items()}
    except (IndexError, KeyError, AttributeError, TypeError, ValueError):
        return []
    host = kinds.pop("host", 0.0)
    table = plain_table("Memory of a rank: the plan, and what was measured", "kind", "GiB", left=("kind",))
    for name, gib in kinds.items():
        table.add_row(name, f"{gib:.2f}")
    # Neither NCCL nor CUDA allocates through torch, whose peak was measured.
    tensors = sum(gib for name, gib in kinds.items() if name not in ("communicators", "reserve"))
    table.add_row("predicted, of tensors", f"{tensors:.2f}")
    table.add_row("predicted, of all", f"{sum(kinds.values()):.2f}")
    measured = history.curves.curve("memory/peak_gib")
    table.add_row("measured, of tensors", f"{measured.high.max():.2f}" if len(measured.tokens) else "without a GPU")
    table.add_row("predicted, on the host", f"{host:.2f}")
    return [table]


def _grids(history: History) -> dict[int, str]:
    """Return the grid of each bucket in grids.json, of the starts that divided attention as the last one."""
    try:
        alike = division(history.recipe, history.starts[-1]["world_size"])
        entries = json.loads(history.run.grids_file.read_text())[alike]
        # Of the entries of a bucket, one for each attention window, the first stays.
        return {entry["sequence_tokens"]: entry["grid"] for entry in reversed(entries)}
    except (OSError, IndexError, KeyError, TypeError, ValueError):  # none yet, or damaged
        return {}


def _evaluation(history: History) -> list[Table]:
    if not history.evaluations:
        return []
    last = history.evaluations[-1]
    spans = sorted({(part["from"], part["to"]) for entry in last["buckets"] for part in entry["by_position"]})
    columns = ("bucket", "tokens", "unigram", "loss", *(f"<{short(to, binary=True)}" for _, to in spans))
    table = plain_table(f"Held-out loss at step {last['step']:,} by bucket and position, nats per token", *columns)
    for entry in last["buckets"]:
        parts = {(part["from"], part["to"]): f"{part['loss']:.3f}" for part in entry["by_position"]}
        losses = (f"{entry['unigram_loss']:.3f}", f"{entry['loss']:.3f}")
        table.add_row(f"{entry['bucket']:,}", f"{entry['tokens']:,}", *losses, *(parts.get(s, "") for s in spans))
    of_tasks = history.long_context
    left_out = [last] if of_tasks is last else [last, of_tasks]
    return [
        table,
        *parts_tables(last),
        *long_context_tables(of_tasks),
        *(table for evaluation in left_out for table in left_out_tables(evaluation)),
    ]


def _trained(history: History) -> list[Table]:
    """Return the table of the run's tokens by source and bucket at its last checkpoint, from trained.json."""
    try:
        found = json.loads(history.run.trained_file.read_text())
        cells = [
            # (source, bucket, trained, reached, repeated, not reached, passes)
            (str(cell["source"]), *(int(cell[key]) for key in ("bucket", "tokens", *_COUNTS)), float(cell["passes"]))
            for cell in found["cells"]
        ]
        title = f"Trained by source and bucket, up to step {int(found['step']):,}"
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged
        return []
    columns = ("source", "bucket", "of the data", "trained", "share", "passes", "repeated", "never reached")
    table = plain_table(title, *columns, left=("source",))
    all_own = max(1, sum(reached + left for _, _, _, reached, _, left, _ in cells))
    all_trained = max(1, sum(trained for _, _, trained, *_ in cells))
    for source, bucket, trained, reached, repeated, left, passes in cells:
        table.add_row(
            Text(source).markup,
            f"{bucket:,}",
            f"{(reached + left) / all_own:.1%}",
            f"{trained:,}",
            f"{trained / all_trained:.1%}",
            f"{passes:.2f}",
            f"{repeated:,}",
            f"{left:,}",
        )
    return [table]


_COUNTS = ("reached_tokens", "repeated_tokens", "not_reached_tokens")


def _ledger(history: History) -> list[Table]:
    """Return the ledgers of the run's data, or why they cannot be read from here."""
    directory = history.recipe.training_directory
    try:
        manifest = Manifest.load(open_store(directory, history.recipe.loader))
    except (OSError, ValueError) as error:
        table = plain_table("Ledger", left=("",))
        table.add_row(Text(f"The data cannot be read from here: {error}").markup)
        return [table]
    return [ledger_table(manifest.ledger), *([sources_table(manifest.ledgers)] if len(manifest.ledgers) > 1 else [])]


def _starts(history: History) -> Table:
    columns = ("time", "host", "ranks", "after step", "steps", "commit", "changed")
    table = plain_table("Starts", *columns, left=("time", "host", "commit", "changed"))
    # A start ends where the next one begins, the last at the last recorded step.
    ends = [*(start.get("from_step", 0) for start in history.starts[1:]), history.last.get("step", 0)]
    for start, end in zip(history.starts, ends, strict=False):  # without a start there is an end all the same
        first, git = start.get("from_step", 0), start.get("git") or {}
        table.add_row(
            minute(start.get("time", "")),
            Text(str(start.get("host", ""))).markup,
            str(start.get("world_size", "")),
            f"{first:,}",
            f"{max(0, end - first):,}",
            str(git.get("commit", ""))[:10] + (" and edits" if git.get("changed") else ""),
            Text(
                ", ".join(f"{key}: {x['before']} to {x['now']}" for key, x in start.get("changed", {}).items())
            ).markup,
        )
    return table


def _events(history: History) -> Table:
    shown = history.events[-SHOWN_EVENTS:]
    title = (
        "Events" if len(shown) == len(history.events) else f"The last {len(shown)} of {len(history.events):,} events"
    )
    table = plain_table(title, "time", "step", "event", "message", left=("time", "event", "message"))
    for event in reversed(shown):
        table.add_row(*(_cell(event, key) for key in ("time", "step", "event", "message")))
    return table


def _cell(record: Record, key: str) -> str:
    value: Any = record.get(key, "")
    if key == "time":
        return minute(value)
    return f"{value:,}" if isinstance(value, int) else Text(str(value)).markup


def minute(time: object) -> str:
    """Return a time of a record, in UTC, to the minute."""
    return str(time)[:16].replace("T", " ")


def _figure(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
