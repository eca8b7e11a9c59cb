"""Attention by its definition in a few lines of plain PyTorch: exact in fp64, and a yardstick in any other dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv")
FACTOR = 2.0
"""Largest allowed error, as a multiple of the error of plain PyTorch in the same dtype; tests/parallel allow it too."""


def visible(num_tokens: int, document_starts: Sequence[int], window: int | None, device: torch.device) -> Tensor:
    """Return which key each query sees, bool [queries, keys]: earlier ones of its document, within the window."""
    at = torch.arange(num_tokens, device=device)
    document = torch.searchsorted(torch.tensor(document_starts, device=device), at, right=True)
    distance = at[:, None] - at[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def by_definition(tensors: Sequence[Tensor], seen: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return out, dq, dk and dv in `dtype`, from q, k, v and dout [1, s, heads or kv_heads, d]."""
    q, k, v, dout = (x.to(dtype) for x in tensors)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(groups, dim=2) for x in leaves[1:])
    scores = torch.einsum("bihd,bjhd->bhij", leaves[0], keys) * q.shape[3] ** -0.5
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", probabilities, values)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, dout)), strict=True))


def error_ratio(
    got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], rows: Tensor
) -> tuple[float, str]:
    """Return the worst error over its limit and its tensor; `got` has the tokens `rows` of `plain` and `exact`."""

    def error(x: Tensor, name: str) -> float:
        return float((x.double() - exact[name][:, rows]).square().mean().sqrt())

    ratios = {name: error(got[name], name) / (FACTOR * error(plain[name][:, rows], name)) for name in NAMES}
    worst = max(ratios, key=lambda name: (ratios[name] != ratios[name], ratios[name]))  # nan is worst
    return (ratios[worst] if ratios[worst] == ratios[worst] else float("inf")), worst
