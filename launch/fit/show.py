"""The plan of a recipe on a world of devices as tables and as JSON: memory, time, and settings that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ..grids.table import grid_json
from ..tables import plain_table
from .device import device_json
from .search import Bucket, Plan, Planner, Setting
from .time import utilization

GIB = 2**30
DAY_S = 86_400


@dataclass(frozen=True)
class Answers:
    """All that `longring plan --gpus` finds out."""

    planner: Planner
    own: Plan
    """Plan of the recipe as it is."""
    nearest: Plan | None
    """Plan with the fewest changes that fits, if the recipe's own does not and there is one."""
    best: Sequence[Plan]
    """Plans of the fastest settings that fit."""
    longest: Plan | None
    """Plan of the longest context that fits with any setting."""
    passes: float | None
    """Passes of the whole run over the data; None: the data is not prepared yet."""

    @property
    def days(self) -> float | None:
        """Days that the whole run takes; None where its tokens in each bucket are not known."""
        return self.own.recipe.train.steps * self.own.seconds / DAY_S if self.planner.tokens else None


def answer(planner: Planner, passes: float | None = None) -> Answers:
    """Return the plan of the planner's recipe, and what the search finds."""
    own = planner.plan(planner.recipe)
    nearest = None if planner.fits(own) else planner.nearest()
    return Answers(planner, own, nearest, planner.three_best(), planner.longest(), passes)


def tables(found: Answers) -> Iterator[Table]:
    """Yield the tables of a plan, each whole at 80 columns."""
    yield _buckets(found)
    yield _parts(found.own)
    yield _memory(found)
    yield _settings(found)


def lines(found: Answers) -> Iterator[str]:
    """Yield the sentences below the tables."""
    planner, recipe = found.planner, found.own.recipe
    budget = recipe.train.steps * recipe.train.global_batch_tokens
    run = f"{recipe.train.steps:,} steps of {recipe.train.global_batch_tokens:,} tokens are {_short(budget)} tokens"
    if found.days is not None and found.passes is not None:
        yield f"{run}: {found.days:.3g} days, {found.passes:.3g} passes over the data"
    else:
        yield f"{run}; days and passes of the run are known once {recipe.training_directory} is prepared"
    missing = found.own.memory_bytes - planner.device.memory_bytes
    if missing > 0:
        kind, most = max(found.own.fullest.memory.by_kind().items(), key=lambda item: item[1])
        yield f"does not fit: {missing / GIB:.3g} GiB too much; {kind} take {most / GIB:.3g} GiB"
        if found.nearest is None:
            yield "no setting of the search fits; take more GPUs, or a smaller model"
    if found.longest is not None:
        changes = Setting.of(found.longest.recipe).changes(recipe)
        yield (
            f"longest context that fits at this batch: {found.longest.buckets[-1].length:,} tokens, "
            f"{found.longest.seconds:.4g} s a step, with {_settings_text(changes)}"
        )


def to_json(found: Answers) -> dict[str, Any]:
    """Return a plan as JSON: everything that the tables and sentences have, in bytes and seconds."""
    planner = found.planner
    return {
        "ranks": planner.world_size,
        "device": device_json(planner.device),
        "topology": asdict(planner.topology),
        "vocab_size": planner.vocab_size,
        "fits": planner.fits(found.own),
        "recipe": _plan_json(found, found.own),
        "nearest": found.nearest and _plan_json(found, found.nearest),
        "best": [_plan_json(found, plan) for plan in found.best],
        "longest": found.longest and _plan_json(found, found.longest),
        "tokens_by_bucket": planner.tokens or None,
        "days": found.days,
        "passes": found.passes,
    }


def _plan_json(found: Answers, plan: Plan) -> dict[str, Any]:
    parallel = plan.recipe.parallel
    return {
        "changes": Setting.of(plan.recipe).changes(found.own.recipe),
        "setting": {**Setting.of(plan.recipe)._asdict(), "sequence_parallel": parallel.sequence_parallel},
        "accumulation_steps": plan.recipe.accumulation_steps(found.planner.world_size),
        "why": _why(found, plan),
        "mean_step_s": plan.seconds,
        "buckets": [_bucket_json(found, plan, bucket) for bucket in plan.buckets],
    }


def _bucket_json(found: Answers, plan: Plan, bucket: Bucket) -> dict[str, Any]:
    rate, share = _rates(found, plan, bucket)
    return {
        "length": bucket.length,
        "cp": bucket.cp,
        "step_s": bucket.time.total,
        "hidden_s": bucket.time.hidden,
        "parts_s": bucket.time.by_part(),
        "tokens_per_s": rate,
        "mfu": share,
        "memory_bytes": bucket.memory.total,
        "host_bytes": bucket.memory.host,
        "kinds_bytes": bucket.memory.by_kind(),
        "moment": bucket.memory.moment,
        "grids": [grid_json(choice) for choice in bucket.grids],
    }


def _rates(found: Answers, plan: Plan, bucket: Bucket) -> tuple[float, float]:
    """Return the tokens/s of all ranks, and the utilization of each, on one bucket."""
    planner = found.planner
    rate = plan.recipe.train.global_batch_tokens / bucket.time.total
    share = utilization(
        plan.recipe, planner.vocab_size, bucket.length, rate / planner.world_size, planner.device.peak_flops
    )
    return rate, share


def _buckets(found: Answers) -> Table:
    """Return the table of buckets: rates, memory, and the days of the run if all of it were in one of them."""
    columns = ("bucket", "cp", "s a step", "tokens/s", "a rank", "MFU", "GiB", "spare", "days")
    note = "days: of the whole run, if all its steps were in this bucket"
    table = plain_table("Steps by bucket", *columns, caption=note)
    for bucket in found.own.buckets:
        rate, share = _rates(found, found.own, bucket)
        spare = found.planner.device.memory_bytes - bucket.memory.total
        table.add_row(
            f"{bucket.length:,}",
            f"{bucket.cp:,}",
            f"{bucket.time.total:.4g}",
            f"{rate:,.0f}",
            f"{rate / found.planner.world_size:,.0f}",
            f"{share:.1%}",
            f"{bucket.memory.total / GIB:,.1f}",
            f"{spare / GIB:,.1f}",
            f"{found.own.recipe.train.steps * bucket.time.total / DAY_S:.3g}",
        )
    return table


def _parts(plan: Plan) -> Table:
    """Return the table of the seconds of a step by part; parts that no bucket has are left out."""
    parts = [part for part in plan.buckets[0].time.by_part() if any(b.time.by_part()[part] for b in plan.buckets)]
    exposed = [part for part in ("ring", "tensor", "zero", "host") if part in parts]
    note = "again: computed again to save memory\nhidden: messages and copies beneath computing"
    if exposed:
        note += f"\n{', '.join(exposed)}: messages and copies that are exposed"
    table = plain_table("Seconds of a step by part", "bucket", *parts, "hidden", caption=note)
    for bucket in plan.buckets:
        seconds = bucket.time.by_part()
        table.add_row(f"{bucket.length:,}", *(_seconds(seconds[part]) for part in parts), _seconds(bucket.time.hidden))
    return table


def _memory(found: Answers) -> Table:
    """Return the table of the memory of a rank by kind, of the bucket that takes the most."""
    bucket, device = found.own.fullest, found.planner.device
    title = f"Memory of a rank, bucket {bucket.length:,}, at its peak in the {bucket.memory.moment}"
    table = plain_table(title, "kind", "GiB", left=("kind",))
    for kind, number in bucket.memory.by_kind().items():
        if number:
            table.add_row(kind, f"{number / GIB:,.2f}")
    table.add_section()
    table.add_row("all", f"{bucket.memory.total / GIB:,.2f}")
    table.add_row("of the device", f"{device.memory_bytes / GIB:.2f}")
    if bucket.memory.host:
        table.add_row("beside it, of the host", f"{bucket.memory.host / GIB:,.2f}")
    return table


def _settings(found: Answers) -> Table:
    """Return the table of the recipe's setting, the nearest that fits, and the fastest."""
    mean = "the mean step of the run" if found.planner.tokens else f"bucket {found.own.buckets[-1].length:,}"
    columns = ("", "GiB", "s a step", "settings that change, and what they gain and pay")
    table = plain_table(f"Settings that fit, by the time of {mean}", *columns, left=(columns[0], columns[-1]))
    rows: list[tuple[str, Plan]] = [("recipe", found.own)]
    rows += [("nearest", found.nearest)] if found.nearest else []
    rows += [(f"best {number}", plan) for number, plan in enumerate(found.best, 1)]
    for name, plan in rows:
        changes = Setting.of(plan.recipe).changes(found.own.recipe)
        table.add_row(
            name,
            f"{plan.memory_bytes / GIB:,.1f}",
            f"{plan.seconds:.4g}",
            f"{_settings_text(changes)}\n{_why(found, plan)}",
        )
        table.add_section()
    return table


def _why(found: Answers, plan: Plan) -> str:
    """Return the reasons for a setting: its spare memory, and what it gains and pays beside the recipe's."""
    spare = found.planner.device.memory_bytes - plan.memory_bytes
    reasons = [f"{spare / GIB:,.1f} GiB spare" if spare >= 0 else f"{-spare / GIB:,.1f} GiB too much"]
    # Means over different buckets do not compare.
    if plan.recipe.lengths == found.own.recipe.lengths:
        changed = {part: seconds - found.own.parts[part] for part, seconds in plan.parts.items()}
        most = sorted(changed, key=lambda part: -abs(changed[part]))[:2]
        least = 1e-3 * found.own.seconds
        reasons += [f"{part} {changed[part]:+.3g} s" for part in most if abs(changed[part]) >= least]
    own, new = (p.fullest.memory.by_kind() for p in (found.own, plan))
    moved = {kind: new[kind] - own[kind] for kind in new}
    kind = max(moved, key=lambda kind: abs(moved[kind]))
    if abs(moved[kind]) >= 0.05 * GIB:  # less prints as 0.0
        reasons.append(f"{kind} {moved[kind] / GIB:+,.1f} GiB")
    if (host := max(bucket.memory.host for bucket in plan.buckets)) >= 0.05 * GIB:
        reasons.append(f"{host / GIB:,.1f} GiB of the host")
    return ", ".join(reasons)


def _settings_text(changes: Mapping[str, object]) -> str:
    """Return changed settings as they are written on the command line, or that there are none."""
    text = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
    return text or "as they are"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds else "0"


def _short(tokens: int) -> str:
    return f"{tokens / 1e9:,.3g}B" if tokens >= 1e9 else f"{tokens / 1e6:,.3g}M"
