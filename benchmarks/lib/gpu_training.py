"""Sections that train: data, steps through `train`, a resumed run, and a rank that is killed."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import ROOT
from .process import free_port
from .script import Row, Size
from .sections import Section, await_all, limit_s, start

RECIPE = ROOT / "launch" / "recipes" / "demo.toml"
LOST = {75, -signal.SIGABRT, 128 + signal.SIGABRT}
"""Exit statuses of a rank that has lost another one, as docs/faults.md has them; a negative one is a signal's."""
HANG_MINUTES = 1.0
"""Minutes after which the ranks that are left count as hanging, unless they notice sooner that one is gone."""
END_S = 60 * HANG_MINUTES + 50
"""Seconds within which they must end: the watchdog polls every 5 s and waits for their reports for up to 31 s."""
BEGIN_S = 30
"""Least number of seconds for a start and its first steps."""
EXACT = ("step", "tokens", "loss", "bucket", "cp", "learning_rate", "grad_norm", "outcome")
"""Metrics that are equal, bit for bit, in a resumed run and in one that never stopped."""


def documents_settings(folder: Path, ranks: int, size: Size) -> list[str]:
    """Return the settings of a small run whose sequences, packed documents, are each spread over all ranks."""
    tokens = 64 if size == "smallest" else 256
    return [
        *(f"run_directory={folder}/run", f"data.directory={folder}/data", "data.source.limit_documents=60"),
        *(f"data.max_bucket_tokens={tokens * ranks}", "data.min_bucket_tokens=64", "data.tokenizer.vocab_size=512"),
        *("data.method=best_fit", "model.num_layers=2", f"parallel.tokens_per_rank={tokens}"),
        *("parallel.cp.schedule=auto", f"train.global_batch_tokens={2 * tokens * ranks}", "train.dtype=bfloat16"),
        *("train.steps=100000", "train.checkpoint_every_steps=5"),
    ]


def train_rows(recipe: str, settings: list[str], last: int) -> Iterator[Row]:
    """Train up to step `last`, as `longring train` does on each rank; yield a row on rank 0. Collective.

    Rank 0 prepares the data first if they are missing; the others wait for it where the ranks meet. The start goes on
    from the run's last checkpoint. The process ends with the rank's status if that is not 0.
    """
    from longring.launch import cli
    from longring.launch.config import load_recipe
    from longring.launch.ranks.rank import as_rank
    from longring.launch.records import read_records
    from longring.launch.run_directory import RunDirectory
    from longring.launch.train import train
    from rich.console import Console

    loaded = load_recipe(recipe, settings)
    is_first = os.environ["RANK"] == "0"
    if is_first and not Path(loaded.data.directory).exists() and (status := cli.main(["prepare", recipe, *settings])):
        sys.exit(status)
    status = as_rank(lambda: train(loaded, Console(markup=False, soft_wrap=True), stop_after=last))
    if status:
        sys.exit(status)
    if not is_first:
        return
    run = RunDirectory(loaded.run_directory)
    steps, [*_, begun] = read_records(run.metrics_file), read_records(run.starts_file)
    mine = [step for step in steps if step["step"] > begun["from_step"]]
    yield {
        "steps": f"{begun['from_step'] + 1} to {last}",
        "ranks": begun["world_size"],
        "cp": "/".join(str(cp) for cp in sorted({step["cp"] for step in mine})),
        "loss": f"{mine[0]['loss']:.4f} to {mine[-1]['loss']:.4f}",
        "first_ms": mine[0]["step_ms"],
        "median_ms": sorted(step["step_ms"] for step in mine)[len(mine) // 2],
        "tokens_per_s": max(step["tokens_per_s"] for step in mine),
        "compiled": (compiled := sum(step["compilations"] for step in mine)),
        "right": is_whole(steps, last) and not compiled,
    }


def curriculum_settings(folder: Path, ranks: int, device: str, size: Size) -> list[str]:
    """Return the settings of the data and the model of a run whose buckets take rings of 1 rank up to all of them."""
    tokens, hidden, layers = (4096, 1024, 12) if device == "cuda" and size == "full" else (64, 64, 2)
    largest_ring = ranks & -ranks  # the largest power of two that divides the number of ranks
    return [
        *(f"data.directory={folder}/data", "data.rest=pack", f"data.min_bucket_tokens={tokens // 2}"),
        *(
            f"data.max_bucket_tokens={tokens * largest_ring}",
            f"data.source.limit_documents={0 if size == 'full' else 60}",
        ),
        *(f"data.tokenizer.vocab_size={8192 if size == 'full' else 512}", f"model.num_layers={layers}"),
        *(f"model.hidden_size={hidden}", f"model.ffn_hidden_size={3 * hidden}", "model.num_heads=8"),
        *("model.num_kv_heads=4", f"parallel.tokens_per_rank={tokens}", "parallel.cp.schedule=auto"),
        *(f"train.global_batch_tokens={2 * tokens * ranks}", "train.dtype=bfloat16"),
    ]


def is_whole(steps: Sequence[Mapping[str, Any]], last: int) -> bool:
    """Return whether every step up to `last` is recorded once, in order, with a finite loss."""
    return [step["step"] for step in steps] == list(range(1, last + 1)) and all(
        step["outcome"] == "good" and step["loss"] is not None and math.isfinite(step["loss"]) for step in steps
    )


def equal_rows(run: str, reference: str, first: int, last: int) -> Iterator[Row]:
    """Yield whether steps `first` to `last` of two runs are equal, bit for bit, on rank 0."""
    from longring.launch.records import read_records

    if os.environ["RANK"] != "0":
        return
    ours, theirs = ({step["step"]: step for step in read_records(Path(x, "metrics.jsonl"))} for x in (run, reference))
    differ = []
    for step in range(first, last + 1):
        one, other = ours.get(step, {}), theirs.get(step, {})
        if not (one and other):
            differ.append(f"step {step}: is missing")
            continue
        differ += [f"step {step}, {key}: {one[key]} and {other[key]}" for key in EXACT if one[key] != other[key]]
    yield {"resumed and uninterrupted": f"steps {first} to {last}", "right": not differ, "note": "; ".join(differ[:2])}


def killed_rows(recipe: str, settings: list[str], processes: list[dict[str, str]], logs: str) -> Iterator[Row]:
    """Train, kill one rank with SIGKILL, and yield how the others ended within `END_S`. One process."""
    from longring.launch.config import load_recipe
    from longring.launch.records import read_records
    from longring.launch.run_directory import RunDirectory

    run = RunDirectory(load_recipe(recipe, settings).run_directory)

    def step() -> int:
        return max((record["step"] for record in read_records(run.metrics_file)), default=0)

    begun, begin_s = step(), limit_s() - END_S - 5
    if begin_s < BEGIN_S:
        yield {"killed": "no rank", "right": False, "note": f"{limit_s():.0f} s are left, too little to start and end"}
        return
    # The first start, which compiles all kernels, may take longer.
    soon = [*settings, f"faults.hang_minutes={HANG_MINUTES}"]
    arguments = {"recipe": recipe, "settings": soon, "last": 100_000}
    running = start(Section("killed-ranks", "lib.gpu_training:train_rows", begin_s, arguments), processes, Path(logs))
    deadline = time.monotonic() + begin_s
    while step() < begun + 3:
        assert time.monotonic() < deadline, f"no three steps within {begin_s:.0f} s"
        assert all(process.poll() is None for process in running), "a rank has ended before one was killed"
        time.sleep(0.1)
    running[-1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    await_all(running, END_S)
    statuses = [process.poll() for process in running[:-1]]
    yield {
        "killed": f"rank {len(running) - 1}",
        "others_ended_with": " ".join("hangs" if status is None else str(status) for status in statuses),
        "after_s": time.monotonic() - killed,
        "right": set(statuses) <= LOST,
    }


def ranks_on_one_gpu(ranks: int) -> list[dict[str, str]]:
    """Return the variables of `ranks` ranks that share the first GPU, with NCCL's messages over loopback sockets.

    NCCL refuses two ranks on one device of one host, so each process has a host id, and is a node, of its own. On a CPU
    the same variables start ranks over gloo.
    """
    port, threads = str(free_port()), max(1, (os.cpu_count() or 1) // ranks)
    return [
        {
            **{"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NCCL_HOSTID": f"rank-{rank}"},
            "OMP_NUM_THREADS": str(threads),
            **{"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NET": "Socket"},
        }
        for rank in range(ranks)
    ]
