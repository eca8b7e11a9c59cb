"""What the machine code of the kernels asks of GPUs that need not be here, and the bound that follows.

    python benchmarks/compile_report.py --json rows.json
    python benchmarks/compile_report.py --only sm_90   # one architecture
    python benchmarks/compile_report.py --try sm_90 forward 16 128
    python benchmarks/compile_report.py \\
        --try sm_90 backward_dkdv 16 128 64,128,8,2 128,64,8,3

Block sizes are those of kernels/tuned.json; --try compiles others, and without any all candidates of
benchmarks/tune_attention.py, the best last. spill_bytes are the bytes that ptxas (or LLVM on AMD, registers x 4)
reports as written to memory because a thread has no register left. b16_loads are the instructions that read single
16-bit elements from global memory, where the compiler does not see that 16 bytes lie side by side.

The loops of 16-bit kernels on sm_90 are counted (benchmarks/lib/sass.py). `bound` is the largest share of the tensor
cores' time that the products of a tile can take in the loop without masks, if all units of a multiprocessor work at
once; `share` is what is left where a program waits for its own products and only the programs beside it on the
multiprocessor fill the gaps. Both are arithmetic, not measurements. A group of warps that computes in a kernel in
Gluon counts as a program: it waits for its own products alone. Clocks are those of one group, and registers those at
the launch, before groups that load give theirs to the others.

The exit status is 1 when the loop of a configuration of sm_90 loses more than a twentieth of its time to spills, when
one without products spills, when one has single loads, or when one needs more shared memory than its device has.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.sass import PRODUCT_FLOPS, Code, Demand, Loop, programs_per_sm
from lib.sass import SHARED_BYTES as L1_BYTES
from lib.script import Row, make_parser, make_table, write_record
from longring.kernels import blocks, gluon_backward, gluon_blocks, gluon_forward, triton_attention, triton_kernels
from rich.console import Console
from rich.progress import track
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from tune_attention import CANDIDATES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Shared memory of one program: the devices' documented limits."""
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
PRODUCTS = {"forward": 2, "backward_dkdv": 4, "backward_dq": 3}
"""Products of a block of queries with one of keys, by kernel."""
TILED = tuple(PRODUCTS)
"""Kernels whose block sizes are tuned; the others read and write once."""
GLUON = tuple(f"gluon_{name}" for name in TILED)
"""Kernels in Gluon, whose block sizes are fixed."""
STRIDES = ("_n", "_b", "_s", "_h")
"""Ends of the names of strides, as in `forward_kernel`."""
SPILLED = 1 / 20
"""Largest share of a loop's products, in clocks, that its spills may take."""
COLUMNS = ("kernel", "configuration", "architecture", "registers", "shared_bytes", "spill_bytes", "b16_loads")
"""Entries of a row that the first table shows."""
Job = tuple[str, str, int, int, blocks.Blocks, bool]
"""Architecture, kernel, bits of an element, head dim, block sizes, and whether a running result is continued."""


def signature(
    kernel: Any, name: str, bits: int, head_dim: int, at: blocks.Blocks, continues: bool
) -> tuple[dict, dict]:
    """Return argument types and constants, as the launch functions of triton_attention.py pass them."""
    element, width = ("bf16", "fp32")[bits == 32], triton_attention.padded(head_dim)
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": width, "BLOCK_M": at.block_m, "BLOCK_N": at.block_n}
    constants |= {"CONTINUES": continues, "SOFTCAP": False, "DESCRIPTORS": bits == 16}
    narrow = {"q", "k", "v", "dout", "part_outs"} | ({"out"} if name == "delta" or not continues else set())
    narrow |= set() if continues else {"dq", "dk", "dv"}
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
        else:
            types[argument] = "i64" if argument[-2:] in STRIDES else "i32"
    return types, used


def compile_row(job: Job) -> Row:
    """Compile one kernel and return its row of the report."""
    arch, name, bits, head_dim, at, continues = job
    tiled = name.removeprefix("gluon_")
    in_gluon = gluon_forward if tiled == "forward" else gluon_backward
    kernel = getattr(in_gluon if name in GLUON else triton_kernels, f"{tiled}_kernel")
    types, constants = signature(kernel, name, bits, head_dim, at, continues)
    options = {"num_warps": at.num_warps, "num_stages": at.num_stages}
    # The pointers that a launch specializes: `triton_attention` passes only multiples of 16 bytes.
    aligned = [x.num for x in kernel.params if types[x.name][0] == "*" and not x.do_not_specialize]
    attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
    source = (GluonASTSource if name in GLUON else ASTSource)(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    registers, spill_bytes = (_amd if arch.startswith("gfx") else _nvidia)(compiled, arch)
    row = {
        "kernel": name + (" (running)" if continues else ""),
        "configuration": f"{'bf16' if bits == 16 else 'fp32'} d{head_dim} {','.join(map(str, at))}",
        "architecture": arch,
        "registers": registers,
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": spill_bytes,
        "b16_loads": compiled.asm["ptx"].count("ld.global.b16") if "ptx" in compiled.asm else None,
    }
    if arch == "sm_90" and name in TILED + GLUON and bits == 16:
        row["programs"] = programs_per_sm(registers, compiled.metadata.shared, compiled.metadata.num_warps)
        # Of two 16-bit tensors, a program reads the rows over which it walks once an iteration, for all of its groups.
        held, walked = (at.block_n, at.block_m) if tiled == "backward_dkdv" else (at.block_m, at.block_n)
        groups = held // gluon_blocks.ROWS.value if name in GLUON else 1
        # An iteration multiplies one block of queries with one of keys.
        flops = 2 * constants["BLOCK_D"] * at.block_m * at.block_n * PRODUCTS[tiled] // groups
        loops = (
            loop_row(loop, at.num_warps, flops, 4 * head_dim * walked // groups, groups * row["programs"])
            for loop in Code.of(compiled.asm["cubin"]).loops()
        )
        # The loop without masks has fewer instructions for the same products.
        row["loops"] = sorted(loops, key=lambda loop: loop["clocks"]["issue"] / loop["clocks"]["products"])
    return row


def loop_row(loop: Loop, num_warps: int, flops: int, l2_bytes: int, programs: int) -> Row:
    """Return the counts of a loop, and the bounds that follow for the `flops` of its block."""
    demand = loop.demand(num_warps, l2_bytes)
    useful = flops / PRODUCT_FLOPS / demand.products  # less than 1 where warps repeat each other's products
    return {
        "instructions": len(loop.body),
        "products": dict(loop.products),
        "barriers": loop.barriers,
        "spill_bytes": loop.spill_bytes,
        "clocks": {unit: round(clocks) for unit, clocks in demand._asdict().items()},
        "bound": round(useful * demand.bound, 3),
        "share": round(useful * demand.share(programs), 3),
    }


def is_wrong(row: Row) -> bool:
    """Return whether a row breaks a rule of this report."""
    wrong = row["shared_bytes"] > SHARED_BYTES[row["architecture"]]
    if row["architecture"] != "sm_90":
        return wrong
    if not row.get("loops"):
        return wrong or row["spill_bytes"] > 0 or row["b16_loads"] > 0
    num_warps, loop = int(row["configuration"].split(",")[2]), row["loops"][0]
    spill_clocks = 32 * num_warps * loop["spill_bytes"] / L1_BYTES
    return wrong or spill_clocks > SPILLED * loop["clocks"]["products"] or row["b16_loads"] > 0


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


def jobs(architectures: list[str], bits_of: Sequence[int], head_dims: Sequence[int]) -> list[Job]:
    """Return every kernel, element size and head dim for these architectures, with the block sizes that ship."""
    found = []
    for arch in architectures:
        for bits in bits_of:
            for head_dim in head_dims:
                for name in (*TILED, "delta", "merge"):
                    plain = blocks.Blocks(triton_attention.rows_at_once(head_dim), 0, 4, 3)
                    at = blocks.tuned(name, arch, bits // 8, head_dim) if name in TILED else plain
                    found.append((arch, name, bits, head_dim, at, False))
                    if name in TILED and (name == "forward" or bits == 16):  # in 32 bit sums have the inputs' dtype
                        found.append((arch, name, bits, head_dim, at, True))
                if arch == "sm_90" and bits == 16 and head_dim in (64, 128):  # others are padded to one of these
                    for name in GLUON:
                        at = gluon_blocks.BLOCKS[name.removeprefix("gluon_")]
                        found += [(arch, name, bits, head_dim, at, continues) for continues in (False, True)]
    return found


def main() -> int:
    parser = make_parser(__doc__ or "", quick="head dim 128 in bf16 alone")
    parser.add_argument("--only", choices=TARGETS, help="compile for this architecture alone")
    parser.add_argument("--try", dest="tried", nargs="+", metavar=("ARCH KERNEL BITS HEAD_DIM", "M,N,WARPS,STAGES"))
    options = parser.parse_args()
    console = Console(width=120)
    if options.tried:
        arch, name, bits, head_dim, *tried = options.tried
        sizes = [tuple(map(int, at.split(","))) for at in tried] or CANDIDATES[int(bits)]
        todo = [(arch, name, int(bits), int(head_dim), blocks.Blocks(*at), False) for at in sizes]
    else:
        architectures = [options.only] if options.only else ["sm_90"] if options.size == "smallest" else list(TARGETS)
        bits_of, head_dims = {
            "full": ((16, 32), HEAD_DIMS),
            "quick": ((16,), (128,)),
            "smallest": ((16,), HEAD_DIMS[:1]),
        }[options.size]
        todo = jobs(architectures, bits_of, head_dims)
    with ProcessPoolExecutor() as pool:
        results = pool.map(compile_row, todo)
        rows = list(track(results, "compiling", len(todo), console=Console(stderr=True), transient=True))
    if options.tried and not options.tried[4:]:
        rows.sort(key=lambda row: row["loops"][0]["share"] if row.get("loops") and not is_wrong(row) else 0)
    columns = ("kernel", "configuration", "device", "registers", "shared", "spill", "b16")
    table = make_table(f"triton {triton.__version__}", columns, left=("kernel", "configuration"))
    title = "an iteration of the loop without masks: clocks of the units of a multiprocessor"
    units = (*Demand._fields[:3], "exp", *Demand._fields[4:])
    loop_columns = (*columns[:2], "programs", "barriers", "spill", *units, "bound", "share")
    loop_table = make_table(title, loop_columns, left=columns[:2])
    for row in rows:
        style = "red" if is_wrong(row) else None
        table.add_row(*(str(row[name]) for name in COLUMNS), style=style)
        if row.get("loops"):
            loop = row["loops"][0]
            counts = (row["programs"], loop["barriers"], loop["spill_bytes"], *loop["clocks"].values())
            cells = (row["kernel"], row["configuration"], *counts, loop["bound"], loop["share"])
            loop_table.add_row(*map(str, cells), style=style)
    console.print(table)
    if loop_table.row_count:
        console.print(loop_table)
    write_record(options.json, {"triton": triton.__version__, "rows": rows})
    num_wrong = sum(map(is_wrong, rows))
    if num_wrong and not options.tried:
        why = "they spill too much or read single elements on sm_90, or need more shared memory than there is"
        console.print(f"[bold red]error:[/] {num_wrong} rows: {why}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
