"""Attention of diagonal bands by definition, in the place of packages that need a GPU: FlashAttention and its like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from longring.kernels import reference
from longring.kernels.attention import zeros_fp32
from longring.kernels.mask import Mask
from torch import Tensor

Bands = tuple[Any, Any, Any, Any]
"""Bounds left and right (None or -1: none), and the starts of packed queries and keys."""


def forward(q: Tensor, k: Tensor, v: Tensor, bands: Bands, scale: Any, softcap: Any) -> tuple[Tensor, Tensor]:
    """Return out and lse: `[b, s, h, d]`, `[b, h, s]`, or packed `[s, h, d]`, `[h, s]`."""
    found = [reference.forward(q_, k_, v_, mask, scale, softcap, None) for q_, k_, v_, mask in _each(q, k, v, bands)]
    outs, lses = zip(*found, strict=True)
    return (outs[0], lses[0]) if q.dim() == 4 else (torch.cat(outs, 1)[0], torch.cat(lses, 2)[0])


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, bands: Bands,
    scale: Any, softcap: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv in the dtype of q; from each dp they subtract rowsum(dout * out) - dlse."""
    delta = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    delta = delta if dlse is None else delta - dlse
    grads = (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))
    parts = (_each(x, y, z, bands) for x, y, z in ((q, k, v), grads, (dout, k, v), (lse.mT, k, v), (delta.mT, k, v)))
    for (q_, k_, v_, mask), into, (dout_, *_), (lse_, *_), (delta_, *_) in zip(*parts, strict=True):
        reference.backward(
            dout_, q_, k_, v_, None, lse_.mT, delta_.mT, mask, scale, softcap, (into[0], into[1], into[2])
        )
    dq, dk, dv = (x.to(q.dtype) for x in grads)
    return dq, dk, dv


def _each(q: Tensor, k: Tensor, v: Tensor, bands: Bands) -> Iterator[tuple[Tensor, Tensor, Tensor, Mask]]:
    """Yield views of the queries, keys and values of each band `[b, s, ...]`, with the band's mask."""
    left, right, query_starts, key_starts = bands
    if query_starts is None or key_starts is None:
        yield q, k, v, band_mask(q.shape[1], k.shape[1], left, right)
        return
    starts, ends = zip(query_starts[:-1].tolist(), key_starts[:-1].tolist(), strict=True), slice(1, None)
    stops = zip(query_starts[ends].tolist(), key_starts[ends].tolist(), strict=True)
    for (a, c), (b, d) in zip(starts, stops, strict=True):
        yield q[None, a:b], k[None, c:d], v[None, c:d], band_mask(b - a, d - c, left, right)


def band_mask(n: int, m: int, left: int | None, right: int | None) -> Mask:
    """Return the mask of n queries and m keys in which query i sees i + m - n - left <= j <= i + m - n + right."""
    diagonal = torch.arange(n) + m - n
    start = torch.zeros(n, dtype=torch.int64) if left in (None, -1) else diagonal - left
    stop = torch.full((n,), m) if right in (None, -1) else diagonal + right + 1
    rows = torch.stack([start, stop]).clamp(0, m).int()
    return Mask(rows, rows, rows)  # `reference` reads rows alone
