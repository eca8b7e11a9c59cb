"""Correctness and speed of the ranks of a node, or of several: the first command for a new cluster.

    python benchmarks/gpu_node.py --json rows.json   # all GPUs of this machine
    python benchmarks/gpu_node.py --quick            # few and small cases
    torchrun ... benchmarks/gpu_node.py              # several: slurm/README.md

The sections run in this order, each in processes of its own with a time limit, so that one that hangs or breaks leaves
the others whole; rank 0 prints a table after each and writes the record:

- order: every grid over 2, 4, ... ranks, forward and backward in bf16, against plain PyTorch in fp64 on one; a grid
  that hangs is the last line of the log;
- memory: the memory of the communicators, once opened and once used by attention over 2, 4, ... ranks;
- guards: the checks before the first step, with the links probed and with every named schedule;
- copies: copies between the GPUs of a node, without NCCL: every named grid against plain PyTorch in fp64 and, bit for
  bit, against NCCL; times of messages and of attention by both;
- channels: the bandwidth of each channel between neighbours, alone and all at once; over several nodes also that of
  a ring inside a node, on the run's communicators and on its own;
- overlap: the share of communication that compute covers, from a profile of one attention forward and backward;
- gradients: a step under ZeRO 1 and 2 whose gradients are summed over ranks during the last backward, and after it;
- train, resume: 50 steps of a run with rings of 1 to all ranks, stopped after 25 and started again;
- again, equal: the first 30 steps in one start, and whether steps 26 to 30 are equal to those resumed, bit for bit.

Everything is written to a new folder of --directory, which all nodes must see. With --recipe the training sections take
that recipe and its prepared data. Without GPUs all of it runs over gloo on the CPU, in small sizes. The exit status is
1 when something is wrong, was cut off or could not be checked; slowness does not count.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import torch
from lib.check import check_device, check_parser, chosen, run_check
from lib.gpu_training import RECIPE, curriculum_settings
from lib.process import free_port
from lib.script import Row, Size, about, refuse
from lib.sections import Result, Section, run_section
from longring.parallel.meet import meet
from longring.parallel.world import World
from rich.console import Console
from torch._C._distributed_c10d import Store

CPU_RANKS = 2
WAIT = timedelta(hours=1)
"""Longest wait for the supervisors of other ranks: longer than any section."""
REPORT_S = 120.0
"""Longest wait of rank 0 for the reports of the others after a section; they may have up to the grace time to end."""


def sections(folder: Path, world: World, device: str, size: Size, recipe: Path | None) -> list[Section]:
    """Return the sections in order."""
    stop, last, compared = (25, 50, 30) if size == "full" else (3, 6, 5)
    settings = [] if recipe else curriculum_settings(folder, world.size, device, size)
    settings += [f"train.steps={last}", "train.warmup_steps=2"] if recipe is None else []
    # The run is saved where it stops, and there only.
    settings += ["train.deterministic=true", "train.checkpoint_every_steps=1000"]
    run, again = folder / "run", folder / "again"

    def measured(name: str, generator: str, seconds: float) -> Section:
        return Section(name, generator, seconds, {"size": size})

    def training(name: str, directory: Path, until: int) -> Section:
        arguments = {"recipe": str(recipe or RECIPE), "settings": [*settings, f"run_directory={directory}"]}
        return Section(name, "lib.gpu_training:train_rows", 900, {**arguments, "last": until})

    equal = {"run": str(run), "reference": str(again), "first": stop + 1, "last": compared}
    return [
        measured("order", "lib.gpu_ranks:order_rows", 900),
        measured("memory", "lib.gpu_ranks:memory_rows", 300),
        measured("guards", "lib.gpu_ranks:guard_rows", 300),
        measured("copies", "lib.gpu_copies:copies_rows", 300),
        measured("channels", "lib.gpu_links:channel_rows", 300),
        measured("overlap", "lib.gpu_links:overlap_rows", 300),
        measured("gradients", "lib.gpu_gradients:gradient_rows", 300),
        training("train", run, stop),
        training("resume", run, last),
        training("again", again, compared),
        Section("equal", "lib.gpu_training:equal_rows", 60, equal),
    ]


def run_together(section: Section, store: Store, world: World, logs: Path) -> Result:
    """Run a section in one process of each rank; return this rank's rows, and on rank 0 what became of all ranks.

    Collective among the processes that torchrun has started, which only supervise: they never touch a GPU.
    """
    name = section.name
    store.set(f"{name}: {world.rank} is here", "")
    if world.rank == 0:
        store.wait([f"{name}: {rank} is here" for rank in range(world.size)])
        store.set(f"{name}: port", str(free_port()))
    # The section's ranks meet at a port of their own: keys of the section before would confuse them.
    own = {"MASTER_PORT": store.get(f"{name}: port").decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    failed = f"{name}: failed"
    result = run_section(section, [own], logs / f"rank-{world.rank:05d}", lambda: store.check([failed]))
    if result.section["status"] not in ("done", "left out"):
        store.set(failed, "")
    store.set(f"{name}: {world.rank} reports", json.dumps(result.section))
    return result if world.rank else judged(result, reports(name, store, world), world.size)


def reports(name: str, store: Store, world: World) -> dict[int, Row]:
    """Return the section's row of every rank that reports in time."""
    keys = [f"{name}: {rank} reports" for rank in range(world.size)]
    deadline = time.monotonic() + REPORT_S
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.1)
    return {rank: json.loads(store.get(key)) for rank, key in enumerate(keys) if store.check([key])}


def judged(result: Result, found: Mapping[int, Row], ranks: int) -> Result:
    """Return rank 0's result with the status and note of the rank that explains most: one that failed by itself.

    A rank without a report has failed as well, and says least.
    """
    silent = {"status": "no report", "note": "its supervisor is gone or waits"}
    rows = {rank: found.get(rank, silent) for rank in range(ranks)}
    others = {rank: row for rank, row in rows.items() if row["status"] not in ("done", "left out")}
    if not others:
        return result
    order = {"failed": 0, "no report": 2}
    rank = min(others, key=lambda rank: (order.get(others[rank]["status"], 1), rank))
    note = f"{len(others)} ranks are not done; rank {rank}: {others[rank]['note'] or 'see its log'}"
    return result._replace(section={**result.section, "status": others[rank]["status"], "note": note})


def main() -> int:
    parser = check_parser(__doc__ or "", quick="few and small cases")
    parser.add_argument("--directory", type=Path, default=Path("runs/gpu-node"), metavar="DIR", help="all nodes see it")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="recipe of the training sections, with its data")
    options = parser.parse_args()
    if "RANK" not in os.environ:  # not under torchrun: all GPUs of this machine
        count = torch.cuda.device_count() or CPU_RANKS
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
    world, device = World.from_environment(), check_device()
    if world.size % 2:
        return refuse(f"{world.size} ranks: rings have 2, 4, ... ranks; start an even number of ranks")
    store = meet(world, WAIT)
    if world.rank == 0:
        store.set("folder", str(options.directory.absolute() / datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S")))
    folder = Path(store.get("folder").decode())
    logs = folder / "logs"
    try:
        to_run = chosen(sections(folder, world, device, options.size, options.recipe), options.only)
    except ValueError as error:
        return refuse(str(error))
    run = partial(run_together, store=store, world=world, logs=logs)
    if world.rank:
        for section in to_run:
            run(section)
        return 0
    console = Console(width=80)
    facts = {"ranks": world.size, "ranks_per_node": world.local_size, "directory": str(folder)}
    console.print({**about(device), **facts})
    return run_check(to_run, run, logs / "rank-00000", console, options.json, facts, {})


if __name__ == "__main__":
    sys.exit(main())
