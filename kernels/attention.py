"""Attention of one tile (queries x keys): the entry point, which dispatches to a backend.

Shapes: q, out `[b, s_q, h_q, d]`; k, v `[b, s_k, h_kv, d]` with h_q a multiple of h_kv (grouped-query attention);
lse, delta `[b, h_q, s_q]` fp32. lse is the natural logarithm of the sum of exp(scores): with it, results over
disjoint sets of keys merge exactly, and a backward rebuilds the probabilities of any tile. Scores are q k `scale`
(None: d^-1/2); a `softcap` c above 0 replaces each score by c tanh(score / c). A row that sees no key has out 0 and
lse -inf.

All backends compute the same function and pass the same tests. `choose_backend` takes the first of `BACKENDS` that
supports the inputs, and logs once why it passed over the ones before it.
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
from .layout import SeqLayout
from .mask import Mask, make_mask
from .merge import merge_

log = logging.getLogger(__name__)


class Case(NamedTuple):
    """The properties of the inputs that decide which backends can compute them."""

    device: str
    dtype: torch.dtype
    head_dim: int
    softcap: bool


class Backend(NamedTuple):
    """One implementation of attention; both functions have the signatures of their namesakes in `reference`."""

    unfit: Callable[[Case], str | None]
    """Return the reason why the backend cannot compute a case, or None if it can."""
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
    """Return the attention `[b, s_q, h_q, d]` of q `[b, s_q, h_q, d]` over k, v `[b, s_k, h_kv, d]`, in q's dtype.

    Differentiable; torch.compile sees one opaque operator. Raises ValueError if the shapes do not fit each other or the
    mask, if the dtypes differ, if `softcap` is below 0, or if `backend` is unknown or cannot compute these inputs.
    """
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
    """Return (out `[b, s_q, h_q, d]` in q's dtype, lse `[b, h_q, s_q]`) of one tile, or extend a `running` result.

    q is `[b, s_q, h_q, d]`, k and v are `[b, s_k, h_kv, d]`. `running` = (out fp32, lse) holds the same queries over
    other keys; this tile's keys are added to it in place, and it is returned. `no_result` makes an empty one. Raises
    ValueError as `attention` does.
    """
    _check(q, k, v, mask)
    if softcap < 0:
        raise ValueError(f"attention: softcap = {softcap}: must be at least 0; leave it out for none")
    chosen = BACKENDS[choose_backend(q, softcap, backend)]
    return chosen.forward(q, k, v, mask, _scale(q, scale), softcap, running)


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
    """Add one tile's gradients to the fp32 buffers `into` = (dq, dk, dv), which have the shapes of q, k, v.

    dout, q and out are `[b, s_q, h_q, d]`, k and v `[b, s_k, h_kv, d]`, lse and delta `[b, h_q, s_q]`. lse and
    `delta` = rowsum(dout * out) cover all keys of a row, not only this tile's; each tile's gradient is then exact, and
    the sum over tiles is the whole gradient (FlashAttention-2, arXiv 2307.08691, algorithm 2). Either delta or `out`
    must be given: torch's operators read out, the other backends compute delta from it. Raises ValueError as
    `attention` does.
    """
    assert delta is not None or out is not None, "attention_backward needs delta or out"
    _check(q, k, v, mask)
    chosen = BACKENDS[choose_backend(q, softcap, backend)]
    chosen.backward(dout, q, k, v, out, lse, delta, mask, _scale(q, scale), softcap, into)


def launch_all(head_dim: int, dtype: torch.dtype, device: torch.device, backend: str = "auto") -> None:
    """Launch once every kernel that attention of such inputs launches, over few tokens: none is compiled later.

    The kernels are compiled for a dtype and a head dim, not for lengths, strides or numbers of heads.
    """
    layout = SeqLayout.contiguous(16)
    mask = make_mask(layout, layout, device=device)
    q, k, v, dout = torch.zeros(4, 1, 16, 2, head_dim, dtype=dtype, device=device)
    out, lse = attention_forward(q, k, v, mask, backend=backend)
    running = attention_forward(q, k, v, mask, running=no_result(q), backend=backend)
    for part in (out, *running[:1]):  # results travel in the inputs' dtype or in fp32
        merge_(*running, part[None], lse[None])
    into = (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))
    attention_backward(dout, q, k, v, lse, row_delta(dout, out), mask, into=into, backend=backend)


def no_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return an empty running result (out `[b, s_q, h_q, d]`, lse `[b, h_q, s_q]`) for q `[b, s_q, h_q, d]`.

    Both are fp32 (fp64 for fp64 inputs). lse is -inf, and out is uninitialized: no backend reads it where lse is -inf.
    """
    b, s, h, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((b, h, s), -torch.inf, dtype=dtype, device=q.device)
    return torch.empty(q.shape, dtype=dtype, device=q.device), lse


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """Return delta = rowsum(dout * out) `[b, h, s]` of dout, out `[b, s, h, d]`, in fp32 (fp64 stays fp64).

    The backward of the softmax subtracts delta from every dp of its row.
    """
    if dout.device.type == "cuda" and dout.dtype != torch.float64:
        from . import triton_attention

        return triton_attention.row_delta(dout, out)
    wide = torch.promote_types(dout.dtype, torch.float32)
    return (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2).contiguous()  # [b, s, h] -> [b, h, s]


def zeros_fp32(like: Tensor) -> Tensor:
    """Return zeros with the shape, any one, and device of `like`, in fp32; in fp64 if `like` is fp64."""
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def choose_backend(q: Tensor, softcap: float, backend: str = "auto") -> str:
    """Return the name of the backend for q `[b, s, h, d]`: `backend` itself, or with "auto" the first that fits.

    Raises ValueError if `backend` is unknown, or if it cannot compute these inputs.
    """
    return _choose(Case(q.device.type, q.dtype, q.shape[-1], softcap > 0), backend)


@cache
def _choose(case: Case, backend: str) -> str:
    reasons = {name: candidate.unfit(case) for name, candidate in BACKENDS.items()}
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"attention backend = {backend!r}: must be one of auto, {', '.join(BACKENDS)}")
        if reasons[backend] is not None:
            raise ValueError(
                f"attention backend = {backend!r}: cannot compute {_describe(case)} ({reasons[backend]}); "
                'set backend = "auto" (in a recipe train.attention_backend)'
            )
        return backend
    # `reference` supports every case, so there is always a first one; all before it have a reason.
    chosen = next(name for name, reason in reasons.items() if reason is None)
    before = list(BACKENDS)[: list(BACKENDS).index(chosen)]
    passed_over = "; ".join(f"{name}: {reasons[name]}" for name in before)
    log.info("attention of %s: %s%s", _describe(case), chosen, f" ({passed_over})" if passed_over else "")
    return chosen


def _describe(case: Case) -> str:
    softcap = ", softcap" if case.softcap else ""
    return f"{str(case.dtype).removeprefix('torch.')} on {case.device}, head dim {case.head_dim}{softcap}"


# The operators take the mask as plain tensors: torch.compile then sees one node and guards on shapes only, so other
# documents of the same length need no new graph.


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
    # The buffers are fp32 because tiles of context parallelism add to them; here there is one tile, rounded at the end.
    mask, into = Mask(rows, columns, host_rows), (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))
    options = {"scale": scale, "softcap": softcap, "backend": backend}
    attention_backward(dout, q, k, v, lse, None, mask, into=into, out=out, **options)
    dq, dk, dv = into
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, rows, columns, host_rows, scale, softcap, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, rows, columns, host_rows, *ctx.options = inputs  # options: scale, softcap, backend
    ctx.save_for_backward(q, k, v, *output, rows, columns, host_rows)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, _):
    q, k, v, out, lse, rows, columns, host_rows = ctx.saved_tensors
    grads = _attention_backward(dout, q, k, v, out, lse, rows, columns, host_rows, *ctx.options)
    return *grads, None, None, None, None, None, None  # none for the mask's three tensors and the three options


_attention.register_autograd(_backward, setup_context=_setup_context)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    if not (q.dim() == k.dim() == 4 and q.shape[::3] == k.shape[::3] and q.dtype == k.dtype == v.dtype):  # [b, s, h, d]
        shown = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (q, k, v))
        raise ValueError(
            f"attention: q, k, v are {shown}: must be [b, s, h, d] of one batch, head dim and dtype; expand or "
            "cast those that differ"
        )
    if q.shape[1] != mask.rows.shape[1] or k.shape[1] != mask.columns.shape[1] or k.shape != v.shape:
        raise ValueError(
            f"attention: q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: must fit the mask of "
            f"{mask.rows.shape[1]} queries and {mask.columns.shape[1]} keys; make the mask from the layouts of q and k"
        )
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: {q.shape[2]} query heads over {k.shape[2]} kv heads: the number of query heads must be a "
            "multiple of the number of kv heads; repeat the heads of k and v until it is"
        )


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
    from . import triton_attention  # imported late: a machine without a GPU need not load triton

    return triton_attention.forward(*arguments)


def _triton_backward(*arguments) -> None:
    from . import triton_attention

    triton_attention.backward(*arguments)


def _torch_backend(unfit: Callable[[Case], str | None], operator: torch_attention.Operator) -> Backend:
    return Backend(unfit, partial(torch_attention.forward, operator), partial(torch_attention.backward, operator))


BACKENDS = {
    "torch_cpu": _torch_backend(_unfit_cpu, torch_attention.CPU),
    "triton": Backend(_unfit_triton, _triton_forward, _triton_backward),
    "cudnn": _torch_backend(partial(_unfit_torch_cuda, largest_head_dim=128), torch_attention.CUDNN),
    "flash": _torch_backend(partial(_unfit_torch_cuda, largest_head_dim=256), torch_attention.FLASH),
    "reference": Backend(lambda case: None, reference.forward, reference.backward),
}
"""The backends in order of preference. On CUDA only `triton` extends a running result in one pass and supports
attention windows and softcap; `cudnn` and `flash` follow it and run only when they are named."""
