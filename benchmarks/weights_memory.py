"""Peak memory and time of an import, of an export and of a rank that begins with a published model, by its size.

    python benchmarks/weights_memory.py --json rows.json   # 64 GB of writing
    python benchmarks/weights_memory.py --quick            # 1B alone

The models have random weights in bf16 and the sizes of Llama 3.2 1B and 3B and Llama 3.1 8B. Every part is a process of
its own, whose peak is the growth of its resident memory; files that the system caches do not count. The rank is one of
eight under ZeRO 3, and its own part of the fp32 weights is left out of its peak. Files lie in TMPDIR: at most 6 bytes a
parameter at a time.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import torch
from lib.process import peak_megabytes
from lib.script import Row, make_parser, make_table, write_record
from longring.launch.checkpoint.stored import fill
from longring.launch.checkpoint.tensors import write_one_by_one
from longring.launch.run_directory import RunDirectory
from longring.launch.weights.bring_in import import_weights
from longring.launch.weights.directory import INDEX, ModelDirectory
from longring.launch.weights.give_out import export_weights
from longring.model.config import ModelConfig, RopeScaling
from longring.model.families.read import PublishedModel
from longring.model.families.weights import weights_of
from longring.model.families.write import write_config
from longring.parallel.fragments import Fragment, Parameter
from rich.console import Console

RANKS = 8
SHAPES: dict[str, dict[str, Any]] = {
    "smallest": {"num_layers": 2, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 512},
    "1B": {
        **{"num_layers": 16, "hidden_size": 2048, "num_heads": 32, "num_kv_heads": 8, "ffn_hidden_size": 8192},
        "tied_head": True,
    },
    "3B": {
        **{"num_layers": 28, "hidden_size": 3072, "num_heads": 24, "num_kv_heads": 8, "ffn_hidden_size": 8192},
        "tied_head": True,
    },
    "8B": {"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "ffn_hidden_size": 14336},
}
SIZES = {"full": ("1B", "3B", "8B"), "quick": ("1B",), "smallest": ("smallest",)}
VOCABULARY = {"smallest": 1000}


def model_of(size: str) -> PublishedModel:
    scaling = RopeScaling(kind="llama3", factor=8, original_tokens=8192)
    config = ModelConfig(**SHAPES[size], rope_scaling=scaling)
    vocabulary = VOCABULARY.get(size, 128_256)
    return PublishedModel(family="llama", config=config, vocab_size=vocabulary, max_tokens=131_072)


def make(size: str, directory: Path) -> None:
    """Write a model of random weights, a file for each of them."""
    model, index = model_of(size), {}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(write_config(model)))
    for number, weight in enumerate(weights_of(model)):
        file = f"model-{number:05d}.safetensors"
        described = {name: ("BF16", shape) for name, shape in weight.theirs.items()}
        tensors = (torch.randn(shape, dtype=torch.bfloat16) for _, shape in described.values())
        write_one_by_one(directory / file, described, tensors, metadata={"format": "pt"})
        index |= dict.fromkeys(described, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": index}))


def read_as_rank(directory: Path) -> float:
    """Read the part of the first of the ranks; return its size in MB."""
    part = []
    with ModelDirectory(directory) as stored:
        for name, entry in stored.parameters.items():
            view = torch.empty(math.ceil(math.prod(entry.shape) / RANKS))
            fill(stored, Fragment(Parameter(name, entry.shape, None), 0, {"weight": view}), ("weight",), 0, 1)
            part.append(view)
    return sum(view.nbytes for view in part) / 2**20


def measured(work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Return the growth of this process's peak in MB, and the seconds that the work takes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before, started = peak_megabytes(), time.monotonic()
    own = work(*arguments)
    return peak_megabytes() - before - (own if isinstance(own, float) else 0), time.monotonic() - started


def in_process(work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Do the work in a process of its own; return its peak in MB and seconds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, work, *arguments).result()


def measure(size: str, folder: Path) -> Row:
    numels = [math.prod(weight.shape) for weight in weights_of(model_of(size))]
    needed = 6 * sum(numels) + 2**30
    if (free := shutil.disk_usage(folder).free) < needed:
        raise SystemExit(f"{folder}: has {free:,} free bytes, and {size} takes {needed:,}; set TMPDIR to a larger disk")
    row: Row = {"size": size, "parameters": sum(numels), "largest_matrix_mb": 4 * max(numels) / 2**20}
    model, run = folder / "model", folder / "run"
    parts = {
        "make": (make, size, model),
        "rank": (read_as_rank, model),
        "import": (import_weights, model, run),
        "export": (export_weights, RunDirectory(run), folder / "exported"),
    }
    for name, (work, *arguments) in parts.items():
        if name == "export":
            shutil.rmtree(model)  # room for what is written
        row[f"{name}_mb"], row[f"{name}_s"] = in_process(work, *arguments)
        Console(stderr=True).print(f"{size} {name}: {row[f'{name}_mb']:,.0f} MB, {row[f'{name}_s']:.0f} s")
    for path in folder.iterdir():
        shutil.rmtree(path)
    return row


def main() -> int:
    options = make_parser(__doc__ or "", quick="1B alone: two minutes").parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # of the processes: what they free goes back to the system at once
    columns = ("size", "parameters", "largest matrix, MB", "import, MB", "s", "export, MB", "s", "rank, MB", "s")
    table = make_table("Peak memory beside what is already held, MB of 2^20 bytes", columns)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for size in SIZES[options.size]:
            row = measure(size, Path(directory))
            rows.append(row)
            found = (f"{row[f'{part}_{unit}']:,.0f}" for part in ("import", "export", "rank") for unit in ("mb", "s"))
            table.add_row(size, f"{row['parameters'] / 1e6:,.0f}M", f"{row['largest_matrix_mb']:,.0f}", *found)
    Console(width=120).print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
