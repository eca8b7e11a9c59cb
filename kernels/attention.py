"""Attention of one tile (queries, keys): the front door.

Shapes: q, out `[b, s_q, h_q, d]`; k, v `[b, s_k, h_kv, d]` with h_q a multiple of h_kv (grouped-query attention);
lse, delta `[b, h_q, s_q]` fp32. lse is the natural logarithm of the sum of exp(scores); with it, results over parts of
the keys can be merged exactly, and a backward can rebuild the probabilities of any tile. Scores are q k `scale` (None:
d^-1/2), and with a `softcap` c above 0 they become c tanh(score / c). A row that sees no key has out 0 and lse -inf.

The work is done by one of several backends; all do the same and pass the same tests. `choose_backend` takes the first
that is fit, in the order of `BACKENDS`, and logs once why those before it are not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, torch_attention
from .mask import Mask

log = logging.getLogger(__name__)


class Case(NamedTuple):
    """What a backend is chosen by."""

    device: str
    dtype: torch.dtype
    head_dim: int
    softcap: bool


class Backend(NamedTuple):
    """One way to compute attention; the two functions have the signatures of those in `reference`."""

    unfit: Callable[[Case], str | None]
    """Why it cannot do this, or None."""
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of a whole tile -> out `[b, s_q, h_q, d]`; differentiable, and opaque to torch.compile."""
    out, _ = _attention(q, k, v, mask.rows, mask.columns, mask.host_rows, _scale(q, scale), softcap, backend)
    return out


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    running: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """out in q's dtype and lse of one tile; or, where a result is `running`, that result with this tile's keys added.

    `running` = (out fp32, lse) of the same queries over other keys is updated in place and returned; `no_result` gives
    one to start from.
    """
    _check(q, k, v, mask)
    work = BACKENDS[choose_backend(q, softcap, backend)]
    return work.forward(q, k, v, mask, _scale(q, scale), softcap, running)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor | None,
    mask: Mask,
    *,
    into: tuple[Tensor, Tensor, Tensor],
    out: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
) -> None:
    """Add one tile's gradients into the fp32 buffers `into` = (dq, dk, dv), shaped like q, k, v.

    lse and `delta` = rowsum(dout * out) belong to the *whole* row, over all keys, so each tile's share is exact and
    the shares just add (FlashAttention-2, arXiv 2307.08691, algorithm 2). `out` may be given instead of delta; torch's
    operators take it as it is.
    """
    assert delta is not None or out is not None, "one of them tells the row's sum"
    _check(q, k, v, mask)
    work = BACKENDS[choose_backend(q, softcap, backend)]
    work.backward(dout, q, k, v, out, lse, delta, mask, _scale(q, scale), softcap, into)


def no_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """A running result for q's queries that has seen no key: lse -inf, and out unread until it is written."""
    b, s, h, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((b, h, s), -torch.inf, dtype=dtype, device=q.device)
    return torch.empty(q.shape, dtype=dtype, device=q.device), lse


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """rowsum(dout * out) -> `[b, h, s]`, fp32 (fp64 stays fp64): what the softmax's backward takes off each row."""
    if dout.device.type == "cuda" and dout.dtype != torch.float64:
        from . import triton_attention

        return triton_attention.row_delta(dout, out)
    wide = torch.promote_types(dout.dtype, torch.float32)
    return (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2).contiguous()


def zeros_fp32(like: Tensor) -> Tensor:
    """An accumulator in fp32 of the given shape (fp64 stays fp64, for tests)."""
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def choose_backend(q: Tensor, softcap: float, backend: str = "auto") -> str:
    """The name of the backend for q: the one asked for, or the first that is fit.

    Raises ValueError for a name that is none, or one asked for that cannot do it, with the reason.
    """
    return _choose(Case(q.device.type, q.dtype, q.shape[-1], softcap > 0), backend)


@cache
def _choose(case: Case, backend: str) -> str:
    reasons = {name: candidate.unfit(case) for name, candidate in BACKENDS.items()}
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"attention backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
        if reasons[backend] is not None:
            raise ValueError(f"attention backend {backend!r} cannot do {_describe(case)}: {reasons[backend]}")
        return backend
    chosen = next(name for name, reason in reasons.items() if reason is None)
    before = list(BACKENDS)[: list(BACKENDS).index(chosen)]
    passed_over = "; ".join(f"{name}: {reasons[name]}" for name in before)
    log.info("attention of %s: %s%s", _describe(case), chosen, f" ({passed_over})" if passed_over else "")
    return chosen


def _describe(case: Case) -> str:
    softcap = ", softcap" if case.softcap else ""
    return f"{str(case.dtype).removeprefix('torch.')} on {case.device}, head dim {case.head_dim}{softcap}"


# The operators take tensors alone, so that torch.compile sees one node and guards on nothing but shapes.


@torch.library.custom_op("longring::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, host_rows: Tensor,
    scale: float, softcap: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mask = Mask(rows, columns, host_rows)
    out, lse = attention_forward(q, k, v, mask, scale=scale, softcap=softcap, backend=backend)
    return out.contiguous(), lse.contiguous()


@_attention.register_fake
def _(q, k, v, rows, columns, host_rows, scale, softcap, backend):
    b, s, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, s), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("longring::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Tensor, columns: Tensor,
    host_rows: Tensor, scale: float, softcap: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mask, into = Mask(rows, columns, host_rows), (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))
    options = {"scale": scale, "softcap": softcap, "backend": backend}
    attention_backward(dout, q, k, v, lse, None, mask, into=into, out=out, **options)
    dq, dk, dv = into
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, rows, columns, host_rows, scale, softcap, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, rows, columns, host_rows, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, rows, columns, host_rows)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, _):
    q, k, v, out, lse, rows, columns, host_rows = ctx.saved_tensors
    grads = _attention_backward(dout, q, k, v, out, lse, rows, columns, host_rows, *ctx.options)
    return *grads, None, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    if q.shape[1] != mask.rows.shape[1] or k.shape[1] != mask.columns.shape[1] or k.shape != v.shape:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit a mask of "
            f"{mask.rows.shape[1]} queries and {mask.columns.shape[1]} keys"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")


def _unfit_cpu(case: Case) -> str | None:
    if case.device != "cpu":
        return "runs on the CPU"
    return "no softcap" if case.softcap else None


def _unfit_triton(case: Case) -> str | None:
    if case.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "runs on CUDA, elsewhere with TRITON_INTERPRET=1"
    if case.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "bfloat16, float16 and float32 only"
    if case.head_dim > 256 or case.head_dim % 8:
        return "head dims up to 256, multiples of 8"
    return None


def _unfit_torch_cuda(case: Case, largest_head_dim: int) -> str | None:
    if case.device != "cuda":
        return "runs on CUDA"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return "bfloat16 and float16 only"
    if case.softcap:
        return "no softcap"
    if case.head_dim > largest_head_dim or case.head_dim % 8:
        return f"head dims up to {largest_head_dim}, multiples of 8"
    return None


def _triton_forward(*arguments) -> tuple[Tensor, Tensor]:
    from . import triton_attention  # CPU machines need not load triton

    return triton_attention.forward(*arguments)


def _triton_backward(*arguments) -> None:
    from . import triton_attention

    triton_attention.backward(*arguments)


def _of_torch(unfit: Callable[[Case], str | None], operator: torch_attention.Operator) -> Backend:
    return Backend(unfit, partial(torch_attention.forward, operator), partial(torch_attention.backward, operator))


BACKENDS = {
    "torch_cpu": _of_torch(_unfit_cpu, torch_attention.CPU),
    "triton": Backend(_unfit_triton, _triton_forward, _triton_backward),
    "cudnn": _of_torch(partial(_unfit_torch_cuda, largest_head_dim=128), torch_attention.CUDNN),
    "flash": _of_torch(partial(_unfit_torch_cuda, largest_head_dim=256), torch_attention.FLASH),
    "reference": Backend(lambda case: None, reference.forward, reference.backward),
}
"""In order of preference. Only `triton` continues a running result in one pass and knows windows and softcap on CUDA,
so on CUDA the two after it run where they are asked for."""
