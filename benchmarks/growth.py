"""CPU time, memory and waiting for data of a rank, on 1 to 8 ranks with equally many tokens each.

    python benchmarks/growth.py --json rows.json   # 10 minutes
    python benchmarks/growth.py --quick            # 1 and 2 ranks

`longring train` runs the demo's recipe, wider, on 1, 2, 4 and 8 ranks of this machine, over gloo, with 512 tokens a
rank and two micro-batches a step: whole sequences of 512, and sequences that all ranks share. Ranks have one thread
each. More ranks than cores take turns on them, so elapsed time says nothing about growth: a step's time is the CPU
seconds of a rank, the mean of all ranks over the steps after the first ones. They include what gloo spends on messages
and on waiting for them. Memory is a rank's resident set without pages that it shares with others, the largest of all
ranks after the last step.
Waiting for data is rank 0's, by metrics.jsonl, the median of the same steps. Longer sequences have more attention:
FLOPs are those of a rank, over those of one rank.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import psutil
from lib.one_rank import RECIPE
from lib.script import Row, make_parser, make_table, write_record
from longring.data.prepare.prepare import prepare
from longring.launch.config import load_recipe
from longring.launch.flops import ModelFlops
from longring.launch.records import read_records
from rich.console import Console

TOKENS = 512
"""Tokens of a rank in a micro-batch."""
MICRO_BATCHES = 2
WIDER = ("model.hidden_size=256", "model.ffn_hidden_size=768", "model.num_layers=4", "model.num_heads=8")
VOCABULARY = 4096
LIMIT_S = 600
HERE = Path(sys.executable).with_name("longring")


class Ranks:
    """CPU seconds and memory of the ranks of a run, watched from outside."""

    def __init__(self, launcher: psutil.Process) -> None:
        self.processes = [
            child for child in launcher.children(recursive=True) if "longring.launch.train" in child.cmdline()
        ]

    def cpu_s(self) -> float:
        """Return the mean CPU seconds of a rank so far."""
        times = [process.cpu_times() for process in self.processes]
        return mean(of.user + of.system for of in times)

    def memory_mb(self) -> float:
        """Return the largest resident memory of a rank that it shares with no other, in MB."""
        return max(process.memory_full_info().uss for process in self.processes) / 2**20


def run(num_ranks: int, length: int, warm_up: int, steps: int, data: list[str], folder: Path) -> Row:
    """Train some steps on a number of ranks with sequences of one length; return the figures of a rank."""
    directory = folder / f"{num_ranks}-{length}"
    settings = [
        *(f"run_directory={directory}", f"train.ranks_per_node={num_ranks}", f"parallel.tokens_per_rank={TOKENS}"),
        *(f"train.global_batch_tokens={num_ranks * TOKENS * MICRO_BATCHES}", f"train.steps={steps + 1}"),
        *(f"curriculum.min_bucket_tokens={length}", f"curriculum.max_bucket_tokens={length}"),
        *("train.warmup_steps=1", "train.checkpoint_every_steps=1000"),
        *("parallel.cp.schedule=ring", "curriculum.cycles=1", *WIDER, *data),
    ]
    with (directory.with_suffix(".said")).open("w") as said:
        launcher = subprocess.Popen([str(HERE), "train", str(RECIPE), *settings], stdout=said, stderr=said)
        began, metrics = time.monotonic(), directory / "metrics.jsonl"

        def await_step(step: int) -> None:
            while not (metrics.exists() and metrics.read_text().count("\n") >= step):
                if launcher.poll() is not None or time.monotonic() - began > LIMIT_S:
                    launcher.kill()
                    raise SystemExit(f"{num_ranks} ranks, {length} tokens: {Path(said.name).read_text()}")
                time.sleep(0.01)

        await_step(warm_up)
        ranks = Ranks(psutil.Process(launcher.pid))
        before, first = ranks.cpu_s(), metrics.read_text().count("\n")
        await_step(steps)
        after, last = ranks.cpu_s(), metrics.read_text().count("\n")
        memory_mb = ranks.memory_mb()  # the run has a step to go
        launcher.wait()
    found = read_records(metrics)[first:last]
    recipe = load_recipe(RECIPE, settings)
    flops = ModelFlops.of(recipe.model, VOCABULARY)
    return {
        "ranks": num_ranks,
        "length": length,
        "cp": length // TOKENS,
        "steps": last - first,
        "mflops_of_a_token": round((flops.matrices(1) + flops.attention([length]) / length) / 1e6, 2),
        "cpu_s": round((after - before) / (last - first), 4),
        "memory_mb": round(memory_mb),
        "data_ms": round(median(record["ms"]["data"] for record in found), 3),
        "step_ms": round(median(record["step_ms"] for record in found), 1),
    }


def main() -> int:
    options = make_parser(__doc__ or "", quick="1 and 2 ranks: two minutes").parse_args()
    sizes, warm_up, steps = {
        "full": ((1, 2, 4, 8), 5, 30),
        "quick": ((1, 2), 5, 30),
        "smallest": ((1,), 1, 3),
    }[options.size]
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = [f"data.directory={temporary}/data", f"data.max_bucket_tokens={max(sizes) * TOKENS}"]
        data += [f"data.tokenizer.vocab_size={VOCABULARY}"]
        if options.size == "smallest":
            data += ["data.source.limit_documents=100"]
        prepare(
            load_recipe(RECIPE, [*data, "run_directory=nowhere", "train.global_batch_tokens=8192"]).data,
            Console(quiet=True),
        )
        for num_ranks in sizes:
            for length in sorted({TOKENS, num_ranks * TOKENS}):
                row = run(num_ranks, length, warm_up, steps, data, folder)
                first = next((other for other in rows if other["cp"] == 1), row)
                over = {
                    "cpu_over_one_rank": round(row["cpu_s"] / first["cpu_s"], 3),
                    "flops_over_one_rank": round(row["mflops_of_a_token"] / first["mflops_of_a_token"], 3),
                }
                rows.append(row | over)
                write_record(options.json, {"rows": rows})
    columns = ("ranks", "length", "cp", "CPU s a rank", "over one", "FLOPs", "MB a rank", "data, ms", "step, ms")
    table = make_table(f"A step of {MICRO_BATCHES} x {TOKENS} tokens a rank", columns)
    for row in rows:
        sizes = (f"{row[name]:,}" for name in ("ranks", "length", "cp"))
        ratios = (f"{row[f'{of}_over_one_rank']:.2f}" for of in ("cpu", "flops"))
        times = f"{row['data_ms']:.2f}", f"{row['step_ms']:,.0f}"
        table.add_row(*sizes, f"{row['cpu_s']:.3f}", *ratios, f"{row['memory_mb']:,}", *times)
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
