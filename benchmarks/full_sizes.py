"""The kernels in full sizes against attention by its definition in fp64: a section of benchmarks/gpu_check.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
from lib.cases import Row, document_tokens
from longring.kernels import attention as front_door
from longring.kernels import layout, merge
from longring.kernels import mask as masks
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

FACTOR = {torch.bfloat16: 3, torch.float16: 3, torch.float32: 64}
"""Errors allowed, in units of what rounding the exact result to the dtype costs, the least anyone can err.

16 bit: probabilities and their gradients are rounded once more before the second product. fp32: sums over thousands
of keys, and exp2 of scores around 10, whose own rounding is some ten units.
"""
NUM_QUICK = 4
"""So many of the checks are for --quick; the million tokens come next."""
MILLION_BYTES = 110 * 10**9
"""Five tensors of 8.6 GB, three of 17.2, and the exact computation of a document."""
SCORES_BYTES = 2**30
"""Of the exact computation's fp64 scores at a time."""


class Check(NamedTuple):
    """One tile computed by the backend and exactly: batch 1."""

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
    """Keys come in so many tiles, each continuing the result of those before."""


def checks(device: str, quick: bool) -> list[Check]:
    """Full sizes on a GPU; the same kinds of masks, few tokens and fp32 elsewhere."""
    n = 16384 if device == "cuda" else 512
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
    return found[:NUM_QUICK] if quick else found


def exact(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, document: Tensor, causal: bool, window: int | None, softcap: float
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv in fp64 by definition, some queries at a time; batch 1, `document` `[s]` of each token."""
    s, heads, d = q.shape[1:]
    kv_heads = k.shape[2]
    group, scale = heads // kv_heads, d**-0.5
    double = {"dtype": torch.float64, "device": q.device}
    found = {name: torch.zeros(x.shape, **double) for name, x in (("out", q), ("dq", q), ("dk", k), ("dv", v))}
    found["lse"] = torch.zeros((1, heads, s), **double)
    position = torch.arange(s, device=q.device)
    step = max(1, SCORES_BYTES // (8 * group * s))
    for kv_head in range(kv_heads):
        keys, values = k[0, :, kv_head].double(), v[0, :, kv_head].double()
        of_group = slice(kv_head * group, (kv_head + 1) * group)
        for start in range(0, s, step):
            rows = slice(start, start + step)
            i = position[rows, None]
            visible = document[rows, None] == document
            visible &= (position <= i) if causal else True
            visible &= (i - position < window) if window else True
            queries, douts = (x[0, rows, of_group].double().transpose(0, 1) for x in (q, dout))
            scores, slope = queries @ keys.T * scale, 1.0
            if softcap:
                capped = torch.tanh(scores / softcap)
                scores, slope = softcap * capped, 1 - capped.square()
            scores = scores.masked_fill(~visible, -torch.inf)
            lse = scores.logsumexp(-1)
            p = (scores - lse.unsqueeze(-1)).exp()  # every query sees itself: lse is finite
            out = p @ values
            delta = (douts * out).sum(-1, keepdim=True)
            ds = p * (douts @ values.T - delta) * slope * scale
            found["lse"][0, of_group, rows] = lse
            found["out"][0, rows, of_group] = out.transpose(0, 1)
            found["dq"][0, rows, of_group] = (ds @ keys).transpose(0, 1)
            found["dk"][0, :, kv_head] += (ds.mT @ queries).sum(0)
            found["dv"][0, :, kv_head] += (p.mT @ douts).sum(0)
    return found


def tile_results(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, whole: Any, backend: str, key_tiles: int, softcap: float, **kind: Any
) -> dict[str, Tensor]:
    """The same by a backend through the tile's functions; gradients in fp32."""
    device, s = q.device, q.shape[1]
    edges = [s * number // key_tiles for number in range(key_tiles + 1)]
    tiles = []
    for start, stop in pairwise(edges):
        keys = layout.SeqLayout(((start, stop),), whole.document_starts)
        tiles.append((slice(start, stop), masks.make_mask(whole, keys, device=device, **kind)))
    running = None if key_tiles == 1 else front_door.no_result(q)
    options = {"softcap": softcap, "backend": backend}
    for part, mask in tiles:
        out, lse = front_door.attention_forward(q, k[:, part], v[:, part], mask, running=running, **options)
    delta = front_door.row_delta(dout, out.to(q.dtype))
    dq, dk, dv = (front_door.zeros_fp32(x) for x in (q, k, v))
    for part, mask in tiles:
        into = (dq, dk[:, part], dv[:, part])
        front_door.attention_backward(dout, q, k[:, part], v[:, part], lse, delta, mask, into=into, **options)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def compared(name: str, got: dict[str, Tensor], truth: dict[str, Tensor], q: Tensor) -> Row:
    """Errors of got as multiples of rounding's; lse by its largest error, in units of 1e-5 + its own size x 1e-5."""
    row: Row = {
        "check": name,
        "dtype": str(q.dtype).removeprefix("torch."),
        "tokens": q.shape[1],
        "head_dim": q.shape[3],
    }
    limits = dict.fromkeys(("out", "dq", "dk", "dv"), FACTOR[q.dtype]) | {"lse": 1}
    for key, limit in limits.items():
        error = got[key].double() - truth[key]
        if key == "lse":
            row[key] = float((error.abs() / (1e-5 + 1e-5 * truth[key].abs())).max())
        else:
            rounding = truth[key].to(q.dtype).double() - truth[key]
            row[key] = float(error.square().mean().sqrt() / rounding.square().mean().sqrt())
        row[f"{key}_limit"] = limit
    # Not "any above": nan is above nothing.
    row["right"] = all(row[key] <= limit for key, limit in limits.items())
    return row | {"note": ""}


def all_rows(device: str, backend: str, quick: bool, deadline: float) -> Iterator[Row]:
    """Every check; those after `deadline` say that they were left out."""
    for number, check in enumerate(checks(device, quick)):
        if number == NUM_QUICK and device == "cuda":
            yield from million_rows(device, backend, deadline)
        if time.time() > deadline:
            yield {"check": check.name, "right": None, "note": "left out: the time was spent"}
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
    """The size the design is for, where there is memory for it."""
    name = "1M tokens x 32 heads x 128"
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if time.time() > deadline:
        yield {"check": name, "right": None, "note": "left out: the time was spent"}
    elif free < MILLION_BYTES:
        note = f"left out: {MILLION_BYTES / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free"
        yield {"check": name, "right": None, "note": note}
    else:
        yield from far_rows(device, backend, tokens=2**20, heads=32, head_dim=128, document=4096)


def far_rows(device: str, backend: str, tokens: int, heads: int, head_dim: int, document: int) -> Iterator[Row]:
    """Packed documents in tensors whose offsets pass 2^31 elements: the first two and last two against fp64."""
    shape = (1, tokens, heads, head_dim)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    whole = layout.SeqLayout.packed((document,) * (tokens // document))
    got = tile_results(q, k, v, dout, whole, backend, key_tiles=1, softcap=0.0)
    ends = [slice(at, at + document) for at in (0, document, tokens - 2 * document, tokens - document)]
    one = torch.zeros(document, dtype=torch.int32, device=device)
    for part in ends:
        alone = [x[:, part] for x in (q, k, v, dout)]
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
    table = Table(
        title="Errors as multiples of rounding the exact result; lse in 1e-5", title_justify="left", box=box.SIMPLE_HEAD
    )
    columns = ("check", "dtype", "tokens", "head_dim", "out", "dq", "dk", "dv", "lse", "right")
    for column in columns:
        table.add_column(column, justify="left" if column in ("check", "dtype") else "right")
    for row in rows:
        cells = [f"{x:.2f}" if isinstance(x := row.get(column), float) else str(x or "") for column in columns[:-1]]
        right = {True: "yes", False: "NO", None: "left out"}[row["right"]]
        table.add_row(*cells, right, style="red" if row["right"] is False else None)
    console.print(table)
    for row in rows:
        if row["note"]:
            console.print(f"{row['check']}: {row['note']}", markup=False, highlight=False)
