"""Compile every Triton kernel for GPUs this machine need not have: registers, shared memory, spills.

    python benchmarks/compile_report.py                          # all head dims and element types
    python benchmarks/compile_report.py --quick --json rows.json # head dim 128, bf16
    python benchmarks/compile_report.py --only sm_90             # one architecture
    python benchmarks/compile_report.py --try sm_90 backward_dkdv 16 128 64,128,8,2 128,64,8,3

Block sizes are those of `kernels/tuned.json`; --try compiles others instead. spill_bytes are what ptxas (or LLVM, on
AMD, in registers x 4) says is written to memory because a thread has no register left: 0 is the aim. Fails when a
configuration of sm_90 spills, or any needs more shared memory than its device has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
from longring.kernels import blocks, triton_attention, triton_kernels
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""What one program may have: the devices' documented limits."""
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
TILED = ("forward", "backward_dkdv", "backward_dq")
"""Kernels whose blocks are tuned; the others read and write once."""


def signature(kernel: Any, name: str, bits: int, head_dim: int, at: Any, continues: bool) -> tuple[dict, dict]:
    """Argument types and constants, as the launch functions of triton_attention.py pass them."""
    element, width = ("bf16", "fp32")[bits == 32], triton_attention.padded(head_dim)
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": width, "BLOCK_M": at.block_m, "BLOCK_N": at.block_n}
    constants |= {"CONTINUES": continues, "SOFTCAP": False, "DESCRIPTORS": bits == 16}
    narrow = {"q", "k", "v", "dout", "part_outs"} | ({"out"} if name == "delta" or not continues else set())
    narrow -= {"out"} if name == "merge" else set()
    tensors = {"out", "lse", "delta", "dq", "dk", "dv", "part_lses"} | narrow
    types, used = {}, {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument], used[argument] = "constexpr", constants[argument]
        elif argument in ("rows", "columns"):
            types[argument] = "*i32"
        elif argument in tensors:
            types[argument] = f"*{element}" if argument in narrow else "*fp32"
        elif argument in ("scale", "softcap"):
            types[argument] = "fp32"
        elif argument.endswith("_strides"):
            num_dims = (3 if "lse" in argument else 4) + ("part" in argument)
            types[argument] = ("i64",) * num_dims
        else:
            types[argument] = "i32"
    return types, used


def compile_row(job: tuple[str, str, int, int, Any, bool]) -> dict[str, object]:
    """One row of the report."""
    arch, name, bits, head_dim, at, continues = job
    kernel = getattr(triton_kernels, f"{name}_kernel")
    types, constants = signature(kernel, name, bits, head_dim, at, continues)
    options = {"num_warps": at.num_warps, "num_stages": at.num_stages}
    compiled = triton.compile(ASTSource(kernel, types, constants), target=TARGETS[arch], options=options)
    registers, spill_bytes = (_amd if arch.startswith("gfx") else _nvidia)(compiled, arch)
    return {
        "kernel": name + (" (running)" if continues else ""),
        "configuration": f"{'bf16' if bits == 16 else 'fp32'} d{head_dim} {','.join(map(str, at))}",
        "architecture": arch,
        "registers": registers,
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": spill_bytes,
    }


def _nvidia(compiled: Any, arch: str) -> tuple[int, int]:
    ptxas = (knobs.nvidia.ptxas_blackwell if arch == "sm_100" else knobs.nvidia.ptxas).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.M)
        assert target
        command = [ptxas, "-v", f"--gpu-name={target[1]}", file.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled, used = re.search(r"(\d+) bytes spill stores", told), re.search(r"Used (\d+) registers", told)
    assert spilled and used, told
    return int(used[1]), int(spilled[1])


def _amd(compiled: Any, arch: str) -> tuple[int, int]:
    def told(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", compiled.asm["amdgcn"])
        assert found, key
        return int(found[1])

    return told("vgpr_count"), 4 * told("vgpr_spill_count")


def jobs(architectures: list[str], quick: bool) -> list[tuple[str, str, int, int, Any, bool]]:
    """What ships for these architectures: each kernel, element size and head dim."""
    found = []
    for arch in architectures:
        for bits in (16,) if quick else (16, 32):
            for head_dim in (128,) if quick else HEAD_DIMS:
                for name in (*TILED, "delta", "merge"):
                    plain = blocks.Blocks(triton_attention.rows_at_once(head_dim), 0, 4, 3)
                    at = blocks.tuned(name, arch, bits // 8, head_dim) if name in TILED else plain
                    found.append((arch, name, bits, head_dim, at, False))
                    if name == "forward":
                        found.append((arch, name, bits, head_dim, at, True))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="head dim 128 in bf16 alone")
    parser.add_argument("--only", choices=TARGETS, help="this architecture alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--try", dest="tried", nargs="+", metavar=("ARCH KERNEL BITS HEAD_DIM", "M,N,WARPS,STAGES"))
    options = parser.parse_args()
    console = Console()
    if options.tried:
        arch, name, bits, head_dim, *tried = options.tried
        choices = [blocks.Blocks(*map(int, blocks_.split(","))) for blocks_ in tried]
        work = [(arch, name, int(bits), int(head_dim), at, False) for at in choices]
    else:
        work = jobs([options.only] if options.only else list(TARGETS), options.quick)
    with ProcessPoolExecutor() as pool:
        results = pool.map(compile_row, work)
        rows = list(track(results, "compiling", len(work), console=Console(stderr=True), transient=True))
    table = Table(
        title=f"triton {triton.__version__}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for heading in ("kernel", "configuration", "device", "registers", "shared", "spill"):
        table.add_column(heading, justify="left" if heading in ("kernel", "configuration") else "right", no_wrap=True)
    wrong = []
    for row in rows:
        arch = row["architecture"]
        too_much = row["shared_bytes"] > SHARED_BYTES[arch] or (arch == "sm_90" and row["spill_bytes"] > 0)
        wrong += [row] * too_much
        table.add_row(*map(str, row.values()), style="red" if too_much else None)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    if wrong and not options.tried:
        console.print(f"[bold red]error:[/] {len(wrong)} rows spill on sm_90 or need more shared memory than there is")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
