"""Time and peak memory of a training step of LongRing beside those of transformers and of plain torch.

    python benchmarks/train_step.py --json rows.json
    python benchmarks/train_step.py --peers   # torchtitan and OLMo-core as well

All members have one architecture, equal weights and the same batch, one sequence for each rank, in fp32; they clip the
gradient by its norm and step AdamW. Theirs divide a batch over several ranks by DDP, ours by ZeRO 1, with whole
sequences (dp) or with each sequence over all ranks (cp). Every rank is a process of one thread. All stay alive and take
turns step by step, so that all meet the same machine; a member that waits is stopped, since idle threads of gloo would
poll. The losses of every step must be equal.

ratio is the time of the fastest of theirs over the member's in the same round, the median over the rounds: above 1, the
member is faster. One ratio is of elapsed time, one of the processor time of all ranks, which other load disturbs less.
The memory is the growth of a rank's peak resident memory since its imports, the largest of the ranks.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import torch
import torch.distributed as dist
from lib import step_members, step_peers
from lib.one_rank import be_the_only_rank
from lib.process import peak_megabytes, versions
from lib.script import Row, Size, make_parser, make_table, write_record
from lib.step_members import Case, Step
from lib.turns import Member, Turn, take_turns
from rich.console import Console

Make = Callable[[Case], Step]


class Answer(NamedTuple):
    """What a rank has found of one step."""

    loss: float
    """Mean loss of this rank before the update."""
    cpu_seconds: float
    """Processor time of the step."""
    peak_mb: float
    """Growth of the peak resident memory since the imports, in MB of 2^20 bytes."""


THEIRS: dict[str, Make] = {
    "transformers": step_members.transformers,
    "torch, fused": step_members.torch_fused,
    "torch, foreach": step_members.torch_foreach,
}
PEERS: dict[str, Make] = {"torchtitan": step_peers.torchtitan, "OLMo-core": step_peers.olmo_core}
SMALLEST = Case(128, 1, 256, 64, 2)
SMALL, MEDIUM, LARGE = (256, 4, 8192), (512, 6, 8192), (768, 12, 16384)
"""Width, layers and vocabulary of 7M, 26M and 114M parameters."""
CASES: dict[Size, list[Case]] = {
    "full": [
        *(Case(*MEDIUM, tokens, 1) for tokens in (1024, 2048)),
        *(Case(*SMALL, tokens, ranks) for tokens, ranks in ((1024, 4), (4096, 1), (8192, 1), (16384, 1))),
        Case(*LARGE, 1024, 1),
    ],
    "quick": [Case(*MEDIUM, 1024, 1), Case(*SMALL, 8192, 1), Case(*SMALL, 1024, 4)],
    "smallest": [SMALLEST],
}
BUDGET_S = {"full": 60.0, "quick": 20.0, "smallest": 0.0}
ROUNDS = {"full": 5, "quick": 2, "smallest": 2}
"""Least number of rounds, the first of which warms up."""
TOLERANCE = 1e-3
"""Largest difference of losses in nats; rounding in fp32 makes 1e-5, another learning rate or batch far more."""


def members_of(case: Case, peers: bool) -> dict[str, Make]:
    """Return all members that take part in a case, ours first."""
    ours: dict[str, Make] = {"ours": step_members.longring}
    if case.ranks > 1:
        ours = {"ours, dp": step_members.longring, "ours, cp": step_members.over_all_ranks}
    return ours | THEIRS | (PEERS if peers else {})


def rank_of(make: Make, case: Case) -> Generator[Answer | None, None, None]:
    """Yield None once the step is made on one rank; then the answer of each step."""
    torch.set_num_threads(1)
    environment = dict(os.environ)
    be_the_only_rank()
    make(SMALLEST._replace(ranks=1))()  # imports what a step needs
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(environment)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before, step = peak_megabytes(), make(case)
    yield None
    while True:
        started = time.process_time()
        loss = step()
        yield Answer(loss, time.process_time() - started, peak_megabytes() - before)


def measure(case: Case, makes: dict[str, Make], size: Size) -> Iterator[Row]:
    """Yield a row for each member: its median step, its ratio and its peak, or the error that it ends with."""
    with ExitStack() as stack:
        members, errors = {}, {}
        for name, make in makes.items():
            member = stack.enter_context(Member(partial(rank_of, make, case), case.ranks))
            if (error := member.error()) is None:
                members[name] = member
            else:
                errors[name] = error
        turns = rounds(members, size)
    clocks: dict[str, Callable[[Turn], float]] = {
        "step": lambda turn: turn.seconds,
        "cpu": lambda turn: sum(answer.cpu_seconds for answer in turn.answers),
    }
    for name in makes:
        row: Row = {"parameters": count(case), "tokens": case.tokens, "ranks": case.ranks, "member": name}
        if name in errors:
            yield row | {"error": errors[name]}
            continue
        for clock, seconds_of in clocks.items():
            seconds = {member: [seconds_of(turn) for turn in took[1:]] for member, took in turns.items()}
            fastest = min((other for other in seconds if other in THEIRS), key=lambda other: median(seconds[other]))
            ratios = [theirs / own for theirs, own in zip(seconds[fastest], seconds[name], strict=True)]
            row |= {f"{clock}_s": round(median(seconds[name]), 4), f"{clock}_ratio": round(median(ratios), 3)}
        last = turns[name][-1]
        measured = {"peak_mb": round(max(answer.peak_mb for answer in last.answers)), "rounds": len(turns[name]) - 1}
        yield row | measured | {"last_loss": round(loss_of(last), 6)}


def rounds(members: dict[str, Member], size: Size) -> dict[str, list[Turn]]:
    """Return each member's turns; the first one only warms up.

    Raises SystemExit if a loss is not that of the first member.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in members}
    until = time.perf_counter() + BUDGET_S[size]
    for number, one_round in enumerate(take_turns(members), 1):
        for name, turn in one_round.items():
            turns[name].append(turn)
        if time.perf_counter() >= until and number >= ROUNDS[size]:
            break
    losses = {name: [loss_of(turn) for turn in took] for name, took in turns.items()}
    expected = next(iter(losses.values()))
    for name, found in losses.items():
        if max(abs(a - b) for a, b in zip(found, expected, strict=True)) > TOLERANCE:
            raise SystemExit(f"{name}: losses {found} are not {expected}")
    return turns


def loss_of(turn: Turn) -> float:
    """Return the mean loss of the ranks."""
    return mean(answer.loss for answer in turn.answers)


def count(case: Case) -> int:
    """Return the number of parameters of a case."""
    return sum(weight.numel() for weight in case.weights().values())


def show(rows: Sequence[Row]) -> None:
    """Print the table of all rows."""
    columns = ("parameters", "tokens", "ranks", "member", "step, s", "ratio", "CPU, s", "ratio", "peak, MB")
    table = make_table("A training step, fp32", columns, left=("member",))
    for row in rows:
        values: list[Any] = [f"{row['parameters'] / 1e6:.1f}M", f"{row['tokens']:,}", row["ranks"], row["member"]]
        if "error" in row:
            values += ["", "", "", "", row["error"][:40]]
        else:
            values += [f"{row['step_s']:.3f}", f"{row['step_ratio']:.2f}", f"{row['cpu_s']:.3f}"]
            values += [f"{row['cpu_ratio']:.2f}", f"{row['peak_mb']:,}"]
        table.add_row(*map(str, values))
    Console(width=100).print(table)


def main() -> int:
    parser = make_parser(__doc__ or "", quick="26M parameters at 1,024 tokens, 7M at 8,192: four minutes")
    parser.add_argument("--peers", action="store_true", help="torchtitan and OLMo-core as well, or their errors")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in CASES[options.size]:
        rows += measure(case, members_of(case, options.peers), options.size)
        write_record(options.json, {"versions": versions(), "rows": rows})  # long runs may be cut off
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
