"""Correctness and speed on this GPU: the one command for a machine that has one.

    python benchmarks/gpu_check.py --json rows.json   # at most 35 minutes
    python benchmarks/gpu_check.py --quick            # a few minutes
    python benchmarks/gpu_check.py --only order       # one section

The sections run in this order, each in processes of its own with a time limit, so that one that hangs or breaks leaves
the others whole; the record is written after each:

- step: a training step of 1.3B parameters on one rank, by bucket length and by level of recomputation, with the memory
  that was predicted; a whole step beside its bar; the attention kernels that a start measures as fastest;
- parts: kernels compiled by random packings; the loss head; a layer compiled and as a CUDA graph; norm, SwiGLU and
  RoPE by liger and compiled;
- backends: attention by every installed kernel, checked and timed by mask, length and head ratio, with bars;
- tiles: benchmarks/cp_virtual.py with the fastest kernel for each kind of tile, cp 2 to 16 over 128k to 1M tokens;
- family: benchmarks/cp_virtual.py --quick, context parallelism on virtual ranks by our own kernels;
- order: four ranks share the GPU over real NCCL (each a host of its own, messages over loopback sockets); every grid
  over 2 and 4 of them, forward and backward, against plain PyTorch in fp64;
- guards, copied_guards: the checks before the first step, with the links probed and with every named schedule, by
  messages of NCCL and by copies between the ranks;
- copies: copies between the ranks through torch's symmetric memory, without NCCL: every named grid against plain
  PyTorch in fp64 and, bit for bit, against NCCL, and the times of both;
- sizes: benchmarks/full_sizes.py, attention in full sizes against fp64;
- train: ten steps of a small recipe with packed documents over four ranks;
- killed: the run of `train` goes on, one rank is killed, and the others must end with status 75, or 134 where torch's
  thread of NCCL ends them;
- tests: the kernels' tests;
- speed: benchmarks/attention.py, its table and bars.

Where a command may take ten minutes, four commands have all sections; the sum of their time limits stands beside them:

    --only step,parts                                510 s
    --only backends,tiles,family                     480 s
    --only order,guards,copied_guards,copies,sizes   480 s
    --only train,killed,tests,speed                  540 s

What a section has no time for is a row that says so, and no error. A section is left out where a package that it needs
is missing: the kernels' need torch, triton, pytest and rich alone. 80 GB of memory are enough. Without a GPU all of it
runs over gloo on the CPU, in small sizes: a rehearsal. The exit status is 1 when something is wrong, was cut off or
could not be checked; slowness does not count.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import attention
import cp_virtual
import full_sizes
from lib import gpu_backends, gpu_step_cases
from lib.check import check_device, check_parser, chosen, run_check
from lib.gpu_training import RECIPE, documents_settings, ranks_on_one_gpu
from lib.script import Size, about, refuse
from lib.sections import Result, Section, run_section
from rich.console import Console

CPU_S = 900
"""Time limit of each section in seconds without a GPU, where nothing is promised about the whole."""
RANKS = 4
STEPS = 10
TABLES = {
    "step": gpu_step_cases.show,
    "backends": gpu_backends.show,
    "tiles": gpu_backends.show_tiles,
    "family": cp_virtual.show,
    "sizes": full_sizes.show,
    "speed": attention.show,
}
"""Tables of the sections that have their own."""


def sections(folder: Path, device: str, size: Size) -> list[tuple[Section, list[dict[str, str]]]]:
    """Return the sections in order, each with the variables of its processes."""
    gpu = device == "cuda"
    count = 2 if size == "smallest" else RANKS
    training = {"recipe": str(RECIPE), "settings": documents_settings(folder, count, size)}
    alone = [{"TRITON_CACHE_DIR": str(folder / "triton")}]  # empty at first: the time to compile is that of a new node

    def on_ranks(
        name: str, generator: str, seconds: float, /, **arguments: Any
    ) -> tuple[Section, list[dict[str, str]]]:
        return Section(name, generator, seconds if gpu else CPU_S, arguments), ranks_on_one_gpu(count)

    def on_one(name: str, generator: str, seconds: float, /, **arguments: Any) -> tuple[Section, list[dict[str, str]]]:
        return Section(name, generator, seconds if gpu else CPU_S, arguments), alone

    # Symmetric memory lets ranks share a GPU if it is told to, and has no multicast then.
    shared = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    sharing = [{**variables, **shared, "LOCAL_WORLD_SIZE": str(count)} for variables in ranks_on_one_gpu(count)]
    by_copies = {"size": size, "peer_copies": "always"}
    killed = {**training, "processes": ranks_on_one_gpu(count), "logs": str(folder / "logs")}
    # Limits in seconds. Of `step` 25 are for the start, 40 for kernels, 90 for a start's measurement, and 150 for
    # micro-batches at 300 TFLOP/s of attention forward, 200 backward and 500 of other products.
    return [
        on_one("step", "lib.gpu_step:step_rows", 360, size=size),
        on_one("parts", "lib.gpu_parts:part_rows", 150, size=size),
        on_one("backends", "lib.gpu_backends:backends_rows", 240, device=device, size=size),
        on_one("tiles", "lib.gpu_backends:tiles_rows", 180, device=device, size=size),
        on_one("family", "lib.gpu_kernels:family_rows", 60, device=device, size=size),
        on_ranks("order", "lib.gpu_ranks:order_rows", 180, size=size),
        on_ranks("guards", "lib.gpu_ranks:guard_rows", 90, size=size),
        (Section("copied_guards", "lib.gpu_ranks:guard_rows", 90 if gpu else CPU_S, by_copies), sharing),
        (Section("copies", "lib.gpu_copies:copies_rows", 60 if gpu else CPU_S, {"size": size}), sharing),
        on_one("sizes", "lib.gpu_kernels:sizes_rows", 60, device=device, size=size),
        on_ranks("train", "lib.gpu_training:train_rows", 100, **training, last=STEPS),
        on_one("killed", "lib.gpu_training:killed_rows", 240, **killed),
        on_one("tests", "lib.gpu_kernels:tests_rows", 120, device=device, size=size),
        on_one("speed", "lib.gpu_kernels:speed_rows", 80, device=device, size=size),
    ]


def main() -> int:
    parser = check_parser(__doc__ or "", quick="small sizes and few cases")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="keep the data, the runs and all logs here")
    options = parser.parse_args()
    device, console = check_device(), Console(width=80)
    console.print(about(device))
    folder = Path(options.directory or tempfile.mkdtemp(prefix="gpu-check-")).absolute()
    logs = folder / "logs"
    found = sections(folder, device, options.size)
    processes = {section.name: variables for section, variables in found}
    try:
        to_run = chosen([section for section, _ in found], options.only)
    except ValueError as error:
        return refuse(str(error))

    def run(section: Section) -> Result:
        return run_section(section, processes[section.name], logs)

    status = run_check(to_run, run, logs, console, options.json, {}, TABLES)
    if options.directory is None:
        shutil.rmtree(folder, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
