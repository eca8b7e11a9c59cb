"""Attention by its definition in fp64, and the errors of a result against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .script import Row

FACTOR = {torch.bfloat16: 3, torch.float16: 3, torch.float32: 64}
"""Largest allowed error, as a multiple of the error of rounding the exact result to the dtype.

16 bit: probabilities and their gradients are rounded once more before the second product. fp32: sums run over thousands
of keys, and exp2 is taken of scores around 10, whose own rounding is some ten units.
"""
SCORES_BYTES = 2**30
"""Size of the fp64 scores that are held at a time."""


def exact(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, document: Tensor, causal: bool, window: int | None, softcap: float
) -> dict[str, Tensor]:
    """Return out, lse, dq, dk and dv in fp64 by the definition of attention.

    q and dout are [1, s, heads, d], k and v [1, s, kv_heads, d]; `document` [s] is the number of each token's document.
    """
    s, heads, d = q.shape[1:]
    kv_heads = k.shape[2]
    group, scale = heads // kv_heads, d**-0.5
    double = {"dtype": torch.float64, "device": q.device}
    found = {name: torch.zeros(x.shape, **double) for name, x in (("out", q), ("dq", q), ("dk", k), ("dv", v))}
    found["lse"] = torch.zeros((1, heads, s), **double)
    position = torch.arange(s, device=q.device)
    # Some queries at a time: their scores [group, step, s] fit SCORES_BYTES.
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


def compared(name: str, got: dict[str, Tensor], truth: dict[str, Tensor], q: Tensor) -> Row:
    """Return the errors of `got` as multiples of the rounding error; for lse the largest over 1e-5 (1 + |lse|)."""
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
