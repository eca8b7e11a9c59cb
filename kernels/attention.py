"""Attention of one tile (queries x keys): the entry point, which dispatches to a backend.

Shapes: q, out `[b, s_q, h_q, d]`; k, v `[b, s_k, h_kv, d]` with h_q a multiple of h_kv (grouped-query attention);
lse, delta `[b, h_q, s_q]` fp32. lse is the natural logarithm of the sum of exp(scores): with it, results over
disjoint sets of keys merge exactly, and a backward rebuilds the probabilities of any tile. Scores are q k `scale`
(None: d^-1/2); a `softcap` c above 0 replaces each score by c tanh(score / c). A row that sees no key has out 0 and
lse -inf.

All backends (`backends.py`) compute the same function and pass the same tests. `backend` names one, or is the text of a
`backends.Selection`; "auto" takes the first that supports the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import BACKENDS, Backend, Selection, choose_backend
from .blocks import architecture
from .case import Case, Task
from .layout import SeqLayout
from .mask import Mask, make_mask
from .merge import merge_


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
    chosen = _backend("forward" if running is None else "continued", q, k, mask, softcap, backend)
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

    Buffers in 16 bit are written instead, whatever they hold: those of a sequence whose keys are all in this tile.
    dout, q and out are `[b, s_q, h_q, d]`, k and v `[b, s_k, h_kv, d]`, lse and delta `[b, h_q, s_q]`. lse and
    `delta` = rowsum(dout * out) cover all keys of a row, not only this tile's; each tile's gradient is then exact, and
    the sum over tiles is the whole gradient (FlashAttention-2, arXiv 2307.08691, algorithm 2). Either delta or `out`
    must be given: some kernels read out, the others compute delta from it. Raises ValueError as `attention` does.
    """
    assert delta is not None or out is not None, "attention_backward needs delta or out"
    _check(q, k, v, mask)
    chosen, given = _backend("backward", q, k, mask, softcap, backend), (dout, q, k, v, out, lse, delta, mask)
    if into[0].itemsize > 2 or chosen.writes(mask):
        chosen.backward(*given, _scale(q, scale), softcap, into)
        return
    sums = (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))
    chosen.backward(*given, _scale(q, scale), softcap, sums)
    for gradient, total in zip(into, sums, strict=True):
        gradient.copy_(total)


def launch_all(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
) -> None:
    """Launch every Triton kernel of attention with such inputs once, over few tokens, so that none is compiled later.

    The kernels are compiled for a dtype and a head dim, not for lengths, strides or numbers of heads. Of a
    `backends.Selection` the default is launched; `choose.rehearse` launches the others.
    """
    backend = Selection.parse(backend).default
    layout = SeqLayout.contiguous(16)
    mask = make_mask(layout, layout, device=device)
    q, dout = torch.zeros(2, 1, 16, num_heads, head_dim, dtype=dtype, device=device)
    k, v = torch.zeros(2, 1, 16, num_kv_heads, head_dim, dtype=dtype, device=device)
    out, lse = attention_forward(q, k, v, mask, backend=backend)
    running = attention_forward(q, k, v, mask, running=no_result(q), backend=backend)
    for part in (out, *running[:1]):  # results travel in the inputs' dtype or in fp32
        merge_(*running, part[None], lse[None])
    delta = row_delta(dout, out)
    for into in ((zeros_fp32(q), zeros_fp32(k), zeros_fp32(v)), gradients_of(q, k, v)):
        attention_backward(dout, q, k, v, lse, delta, mask, into=into, backend=backend)


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
    mask, into = Mask(rows, columns, host_rows), gradients_of(q, k, v)
    options = {"scale": scale, "softcap": softcap, "backend": backend}
    attention_backward(dout, q, k, v, lse, None, mask, into=into, out=out, **options)
    return into


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


def gradients_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return buffers in the inputs' dtype for the gradients of a single tile: fresh in 16 bit, else zeros."""
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if x.itemsize == 2 else zeros_fp32(x) for x in (q, k, v)
    )
    return dq, dk, dv


def case_of(q: Tensor, k: Tensor, softcap: float = 0.0) -> Case:
    """Return the case of q `[b, s_q, h_q, d]` and k `[b, s_k, h_kv, d]`."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Case(q.device.type, architecture(q.device), q.dtype, q.shape[-1], k.shape[2], softcap > 0, deterministic)


def _backend(task: Task, q: Tensor, k: Tensor, mask: Mask, softcap: float, backend: str) -> Backend:
    """Return the backend for a tile. Raises ValueError as `choose_backend` does."""
    case = case_of(q, k, softcap)
    return BACKENDS[choose_backend(case, Selection.parse(backend).of_tile(case, task, mask))]


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
