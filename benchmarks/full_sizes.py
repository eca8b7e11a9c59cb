"""Errors of the kernels in full sizes, against attention by its definition in fp64.

    python benchmarks/full_sizes.py --json rows.json  # two minutes of a GPU
    python benchmarks/full_sizes.py --quick           # four checks

On CUDA sequences have 16,384 tokens, and one a million, whose offsets pass 2^31, where the device has 66 GB free.
On a CPU they have 512 tokens in fp32. An error is a multiple of the error of rounding the exact result to the dtype.
The exit status is 1 when an error is above its limit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.cases import document_tokens
from lib.exact import compared, exact
from lib.script import Row, Size, make_parser, make_table, write_record
from lib.sections import NO_TIME
from longring.kernels import attention as front_door
from longring.kernels import layout, merge
from longring.kernels import mask as masks
from rich.console import Console
from torch import Tensor

NUM_QUICK = 4
"""Number of checks of --quick; the million tokens come after them."""
MILLION_HEADS = 20
"""Heads of the million tokens: 2^20 x 20 x 128 elements are beyond 2^31, and fit a device of 80 GB."""
MILLION_BYTES = 66 * 10**9
"""Memory for five tensors of 5.4 GB, three of 10.7 GB, and the exact computation of one document."""


class Check(NamedTuple):
    """One sequence, batch 1, that the backend computes and that is computed exactly."""

    name: str
    document_tokens: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    causal: bool = True
    window: int | None = None
    softcap: float = 0.0
    key_tiles: int = 1
    """Number of tiles into which the keys are cut; each tile continues the result of those before it."""


def checks(device: str, size: Size) -> list[Check]:
    """Return the checks: full sizes on a GPU, and on a CPU the same masks with few tokens in fp32."""
    n = 16384 if device == "cuda" else 128 if size == "smallest" else 512
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if device == "cpu":
        bf16 = fp16 = fp32  # torch's operator for the CPU sums gradients of grouped heads in 16 bit
    packed = document_tokens(n)
    found = [
        Check("causal", (n,), 16, 2, 128, bf16),
        Check("documents", packed, 16, 2, 128, bf16),
        Check("keys in 4 tiles", packed, 16, 16, 128, bf16, key_tiles=4),
        Check("window", (n,), 16, 2, 128, bf16, window=n // 8 - 3),
        *(Check("causal", (n,), 16, 16, d, dtype) for d in (64, 256) for dtype in (bf16, fp16)),
        Check("causal", (n,), 16, 16, 128, fp16),
        *(Check("causal, fp32", (n // 4,), 8, 2, d, fp32) for d in (64, 128)),
        Check("full", (n,), 16, 16, 64, bf16, causal=False),
        Check("no block's multiple", (n - 37,), 16, 2, 80, bf16),
        Check("softcap", (n,), 16, 2, 128, bf16, softcap=20.0),
    ]
    return found if size == "full" else found[:NUM_QUICK]


def tile_results(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, whole: Any, backend: str, key_tiles: int, softcap: float, **kind: Any
) -> dict[str, Tensor]:
    """Return out, lse, dq, dk and dv of a backend, computed tile by tile of the keys; gradients are in fp32."""
    device, s = q.device, q.shape[1]
    edges = [s * number // key_tiles for number in range(key_tiles + 1)]
    tiles = []
    for start, stop in pairwise(edges):
        keys = layout.SeqLayout(((start, stop),), whole.document_starts)
        tiles.append((slice(start, stop), masks.make_mask(whole, keys, device=device, **kind)))
    running = None if key_tiles == 1 else front_door.no_result(q)
    options = {"softcap": softcap, "backend": backend}
    out = lse = None
    for part, mask in tiles:
        out, lse = front_door.attention_forward(q, k[:, part], v[:, part], mask, running=running, **options)
    assert out is not None and lse is not None
    delta = front_door.row_delta(dout, out.to(q.dtype))
    dq, dk, dv = (front_door.zeros_fp32(x) for x in (q, k, v))
    for part, mask in tiles:
        into = (dq, dk[:, part], dv[:, part])
        front_door.attention_backward(dout, q, k[:, part], v[:, part], lse, delta, mask, into=into, **options)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def all_rows(device: str, backend: str, size: Size, deadline: float) -> Iterator[Row]:
    """Yield a row for every check; checks after `deadline` (of `time.time`) say that they were left out."""
    for number, check in enumerate(checks(device, size)):
        if number == NUM_QUICK and device == "cuda":  # --quick ends before it
            yield from million_rows(device, backend, deadline)
        if time.time() > deadline:
            yield {"check": check.name, "note": NO_TIME}
            continue
        generator = torch.Generator(device).manual_seed(0)
        tokens = sum(check.document_tokens)
        q, k, v, dout = (
            torch.randn((1, tokens, h, check.head_dim), generator=generator, device=device, dtype=check.dtype)
            for h in (check.heads, check.kv_heads, check.kv_heads, check.heads)
        )
        whole = layout.SeqLayout.packed(check.document_tokens)
        kind = {"causal": check.causal, "window": check.window}
        got = tile_results(q, k, v, dout, whole, backend, check.key_tiles, check.softcap, **kind)
        lengths = torch.tensor(check.document_tokens, device=device)
        document = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        yield compared(check.name, got, exact(q, k, v, dout, document, softcap=check.softcap, **kind), q)
        del q, k, v, dout, got


def million_rows(device: str, backend: str, deadline: float) -> Iterator[Row]:
    """Yield the rows of a million tokens, or one that says why they were left out."""
    name = f"1M tokens x {MILLION_HEADS} heads x 128"
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if time.time() > deadline:
        yield {"check": name, "note": NO_TIME}
    elif free < MILLION_BYTES:
        note = f"left out: {MILLION_BYTES / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free"
        yield {"check": name, "right": None, "note": note}
    else:
        yield from far_rows(device, backend, tokens=2**20, heads=MILLION_HEADS, head_dim=128, document=4096)


def far_rows(device: str, backend: str, tokens: int, heads: int, head_dim: int, document: int) -> Iterator[Row]:
    """Yield the errors of the first two and last two packed documents, where offsets pass 2^31 elements."""
    shape = (1, tokens, heads, head_dim)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    whole = layout.SeqLayout.packed((document,) * (tokens // document))
    got = tile_results(q, k, v, dout, whole, backend, key_tiles=1, softcap=0.0)
    alone, cut = (q, k, v, dout), got
    ends = [slice(at, at + document) for at in (0, document, tokens - 2 * document, tokens - document)]
    one = torch.zeros(document, dtype=torch.int32, device=device)
    for part in ends:
        alone = (q[:, part], k[:, part], v[:, part], dout[:, part])
        cut = {name: x[:, :, part] if name == "lse" else x[:, part] for name, x in got.items()}
        truth = exact(*alone, one, causal=True, window=None, softcap=0.0)
        yield compared(f"{tokens} x {heads} heads, {part.start} on", cut, truth, alone[0]) | {"tokens": tokens}
    # The merge reads and writes the same offsets: a result merged with itself keeps out, and its lse grows by log 2.
    del q, k, v, dout, got["dq"], got["dk"], got["dv"], alone, cut
    out, lse = got["out"].float(), got["lse"].clone()
    merge.merge_(out, lse, got["out"].unsqueeze(0), got["lse"].unsqueeze(0))
    worst = 0.0
    for part in ends:
        worst = max(worst, float((out[:, part] - got["out"][:, part].float()).abs().max()))
        worst = max(worst, float((lse[:, :, part] - got["lse"][:, :, part] - 0.6931472).abs().max()))
    yield {"check": "merge at the same offsets", "tokens": tokens, "right": worst < 1e-5, "note": f"within {worst:.1g}"}


def show(rows: list[Row], console: Console) -> None:
    """Print a line for each check, and the notes of those left out."""
    columns = ("check", "dtype", "tokens", "head_dim", "out", "dq", "dk", "dv", "lse", "right")
    title = "Errors as multiples of the error of rounding the exact result; lse in 1e-5"
    table = make_table(title, columns, left=("check", "dtype"))
    for row in rows:
        cells = [f"{x:.2f}" if isinstance(x := row.get(column), float) else str(x or "") for column in columns[:-1]]
        right = {True: "yes", False: "NO", None: "left out"}[row.get("right")]
        table.add_row(*cells, right, style="red" if row.get("right") is False else None)
    console.print(table)
    for row in rows:
        if row["note"]:
            console.print(f"{row['check']}: {row['note']}", markup=False, highlight=False)


def main() -> int:
    options = make_parser(__doc__ or "", quick="four checks, no million tokens").parse_args()
    device, backend = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "auto")
    console = Console(width=100)
    with console.status("measuring"):
        rows = list(all_rows(device, backend, options.size, float("inf")))
    show(rows, console)
    write_record(options.json, {"rows": rows}, device)
    return 1 if any(row.get("right") is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
