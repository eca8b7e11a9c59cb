"""Executor: runs a rank's plan, forward and backward, over any transport.

A pass is a generator that yields each message when it must wait for it; the transport that drives the generator does
the waiting. So one process can run all ranks of a plan in turn, with the code that runs on a cluster.

Tensors of one shape travel as one: k and v, q and dout, dk and dv are stacked to a *pack* `[b, s, 2, h, d]`, lse and
delta to `[b, 2, h, s]`, in which a kernel finds the rows of a head side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.attention import attention_backward, attention_forward, row_delta, zeros_fp32
from ...kernels.merge import merge_
from .compiled import CompiledPlan, Compute, Free, Merge, NewSum, Post, Send, View, Wait
from .heads import heads_for_tokens, tokens_for_heads
from .plan import Flow, Message
from .rows import Rows
from .spec import AttentionSpec
from .transports import Transport
from .visible import Side

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Tensors that the backward needs: q, k, v, out `[b, s, h, d]` and lse `[b, h, s]`, with all tokens of the rank's grid
position and the heads of the rank."""


def forward(
    spec: AttentionSpec, rank: int, q: Tensor, k: Tensor, v: Tensor, transport: Transport, *, scale: float | None = None
) -> Generator[Message, None, tuple[Tensor, Saved]]:
    """Run the forward of one rank: q `[b, s, h_q, d]`, k, v `[b, s, h_kv, d]` -> out like q, and the tensors to save.

    Scores are q k `scale` (default: d^-1/2). Collective: every rank of the grid runs its own generator. Yields each
    message that must be waited for.
    """
    plan, heads = spec.compiled("forward", rank), spec.grid.heads
    if heads > 1:
        q, k, v = yield from tokens_for_heads([q, k, v], plan, heads, transport)
    run = _Forward(spec, plan, transport, scale, q, k, v)
    yield from run.walk()
    out, lse = run.out.to(q.dtype), run.lse
    # Saved before heads are traded back: the backward needs the position's tokens with the rank's heads.
    saved = (q, k, v, out, lse)
    if heads > 1:
        (out,) = yield from heads_for_tokens([out], [q.shape[2] * heads], plan, heads, transport)
    return out, saved


def backward(
    spec: AttentionSpec,
    rank: int,
    dout: Tensor,
    saved: Saved,
    num_kv_heads: int,
    transport: Transport,
    *,
    scale: float | None = None,
) -> Generator[Message, None, tuple[Tensor, Tensor, Tensor]]:
    """Run the backward of one rank: dout `[b, s, h_q, d]` -> dq like dout, dk and dv `[b, s, h_kv, d]`, with all heads.

    `scale` is that of the forward. Collective: every rank of the grid runs its own generator. Yields each message that
    must be waited for.
    """
    plan, heads = spec.compiled("backward", rank), spec.grid.heads
    q, k, v, out, lse = saved
    if heads > 1:
        (dout,) = yield from tokens_for_heads([dout], plan, heads, transport)
    run = _Backward(spec, plan, transport, scale, q, k, v, out, lse, dout)
    yield from run.walk()
    grads = [grad.to(q.dtype) for grad in (run.dq, run.dk, run.dv)]
    if heads > 1:
        num_heads = [q.shape[2] * heads, num_kv_heads, num_kv_heads]
        grads = yield from heads_for_tokens(grads, num_heads, plan, heads, transport)
    dq, dk, dv = grads
    return dq, dk, dv


class _Form(NamedTuple):
    """Shapes of the packs that hold a share, or results for it; the number of rows is left open."""

    num_vectors: int
    """Number of tensors `[b, rows, h, d]`."""
    num_stats: int
    """Number of tensors `[b, h, rows]`."""
    batch: int
    vector_dims: tuple[int, ...]
    """Dims of the first pack after its rows: h and d, before them n if it holds n > 1 tensors."""
    stat_dims: tuple[int, ...]
    """Dims of the second pack before its rows: b and h, between them n if it holds n > 1 tensors."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Form:
        """Return the form of the packs of `tensors`: first those of shape `[b, s, h, d]`, then those of `[b, h, s]`."""
        b, _, h, d = tensors[0].shape
        num_vectors = sum(x.dim() == 4 for x in tensors)
        num_stats = len(tensors) - num_vectors
        vector_dims = (num_vectors, h, d) if num_vectors > 1 else (h, d)
        return cls(num_vectors, num_stats, b, vector_dims, (b, num_stats, h) if num_stats > 1 else (b, h))

    def empty(self, q: Tensor, num_rows: int, dtype: torch.dtype) -> list[Tensor]:
        """Return uninitialized packs for a number of rows, on the device of q.

        `[b, rows, h, d]` in `dtype`, and of stats `[b, h, rows]` in fp32 (fp64 if q is); a pack of n > 1 tensors is
        `[b, rows, n, h, d]` or `[b, n, h, rows]`.
        """
        packs = [q.new_empty((self.batch, num_rows, *self.vector_dims), dtype=dtype)]
        if self.num_stats:
            packs.append(q.new_empty((*self.stat_dims, num_rows), dtype=_sum_dtype(q)))
        return packs

    def tensors(self, packs: list[Tensor]) -> list[Tensor]:
        """Return the tensors in packs, as views: each `[b, rows, h, d]`, then each `[b, h, rows]`."""
        found = list(packs[0].unbind(2)) if self.num_vectors > 1 else packs[:1]
        if self.num_stats:
            found += packs[1].unbind(1) if self.num_stats > 1 else packs[1:]
        return found


class _Run(ABC):
    """Pass of one rank over the query x kv grid, after its tokens have been traded for heads."""

    def __init__(
        self,
        spec: AttentionSpec,
        plan: CompiledPlan,
        transport: Transport,
        scale: float | None,
        own: dict[Side, list[Tensor]],
        home: dict[Side, list[Tensor]],
    ) -> None:
        """Begin with the tensors of the own shares, and with sums of results for them, `[b, s, h, d]`, `[b, h, s]`."""
        self.plan, self.transport, self.q = plan, transport, own["queries"][0]
        self.backend, self.scale = spec.backend, scale
        self.masks = spec.masks(plan.rank, self.q.device)
        self.views: list[list[Tensor]] = [[] for _ in range(plan.num_slots)]
        """Tensors of each slot, as kernels take them."""
        self.views[:4] = own["queries"], own["keys"], home["queries"], home["keys"]  # OWN and HOME
        self.packs: dict[int, list[Tensor]] = {}
        """Memory of the slots that are not views: buffers of messages, foreign shares and sums for them."""
        self.forms: dict[Flow, _Form] = {"queries": _Form.of(own["queries"]), "keys": _Form.of(own["keys"])}
        self.forms["query_results"] = _Form.of(home["queries"])
        if home["keys"]:
            self.forms["key_results"] = _Form.of(home["keys"])
        # Sums that grow on their way are not rounded.
        narrow = _sum_dtype(self.q) if not spec.narrow_results else self.q.dtype
        routes: dict[Flow, str] = {"query_results": spec.grid.query_route, "key_results": spec.grid.kv_route}
        self.dtypes: dict[Flow, torch.dtype] = {"queries": self.q.dtype, "keys": self.q.dtype}
        self.dtypes |= {flow: _sum_dtype(self.q) if route == "round" else narrow for flow, route in routes.items()}

    @abstractmethod
    def compute(self, operation: Compute) -> None:
        """Compute a tile into the results for its queries and for its keys."""

    @abstractmethod
    def merge(self, operation: Merge) -> None:
        """Merge a partial result."""

    @abstractmethod
    def clear(self, packs: list[Tensor]) -> None:
        """Make packs of sums, with the shapes of `_Form.empty`, hold no result yet."""

    def walk(self) -> Iterator[Message]:
        """Run all operations; yields each message that must be waited for, in the order of the plan."""
        run = {View: self.view, NewSum: self.new_sum, Post: self.post, Free: self.free}
        run |= {Merge: self.merge, Compute: self.compute}
        for operation in self.plan.operations:
            if isinstance(operation, Wait):
                yield operation.message
            else:
                run[type(operation)](operation)
        assert not self.packs, "the plan frees everything"

    def view(self, operation: View) -> None:
        """Cut rows out of the tensors of a slot."""
        slot, source, start, num_rows = operation
        # Rows are dim 1 of [b, s, h, d] and dim 2 of [b, h, s].
        self.views[slot] = [x.narrow(1 if x.dim() == 4 else 2, start, num_rows) for x in self.views[source]]

    def new_sum(self, operation: NewSum) -> None:
        """Make sums of results for a foreign share."""
        flow: Flow = "query_results" if operation.side == "queries" else "key_results"
        packs = self.forms[flow].empty(self.q, operation.num_rows, _sum_dtype(self.q))
        self.clear(packs)
        self.packs[operation.slot], self.views[operation.slot] = packs, self.forms[flow].tensors(packs)

    def post(self, operation: Post) -> None:
        """Start messages."""
        receives: dict[Message, list[Tensor]] = {}
        for message, slot, num_rows, is_share in operation.receives:
            form = self.forms[message.flow]
            # The memory is made at the post and dropped by `free`: no message is held longer than its plan says.
            receives[message] = self.packs[slot] = packs = form.empty(self.q, num_rows, self.dtypes[message.flow])
            if is_share:
                self.views[slot] = form.tensors(packs)
        sends: dict[Message, list[Tensor]] = {}
        for send in operation.sends:
            sends[send.message] = self.packs[send.slot] = self.content(send)  # kept until it is freed
        self.transport.post(sends, receives)

    def content(self, send: Send) -> list[Tensor]:
        """Return the packs to send, contiguous: a share from where it lies, a sum in the dtype in which it travels.

        The packs have the shapes of `_Form.empty` for the rows of the message.
        """
        if send.source not in self.packs:  # the own share, or a view of it
            own = self.views[send.source]
            # Rows are dim 1 of [b, s, h, d] and dim 2 of [b, h, s].
            return _packed(
                own if send.rows is None else [_rows_of(x, 1 if x.dim() == 4 else 2, send.rows) for x in own]
            )
        packs = self.packs[send.source]
        if send.message.is_result:
            return [packs[0].to(self.dtypes[send.message.flow]), *packs[1:]]  # lse is never rounded
        if send.rows is None:
            return packs
        # Rows are dim 1 of the first pack and the last dim of the second.
        return [_rows_of(x, dim, send.rows) for x, dim in zip(packs, (1, -1), strict=False)]

    def free(self, operation: Free) -> None:
        """Drop the tensors of some slots."""
        for slot in operation.slots:
            self.views[slot] = []
            self.packs.pop(slot, None)


class _Forward(_Run):
    """Forward of one rank: results for queries are (out, lse), merged by lse; keys have no results."""

    def __init__(
        self, spec: AttentionSpec, plan: CompiledPlan, transport: Transport, scale: float | None,
        q: Tensor, k: Tensor, v: Tensor,
    ) -> None:  # fmt: skip
        b, s, h, _ = q.shape
        # Neutral for the kernels' running softmax: out = 0, lse = -inf.
        self.out, self.lse = zeros_fp32(q), torch.full((b, h, s), -torch.inf, dtype=_sum_dtype(q), device=q.device)
        own: dict[Side, list[Tensor]] = {"queries": [q], "keys": [k, v]}
        super().__init__(spec, plan, transport, scale, own, {"queries": [self.out, self.lse], "keys": []})

    def compute(self, operation):
        (q,), (k, v), (out, lse) = (self.views[slot] for slot in operation[1:4])
        mask = self.masks[operation.tile]
        attention_forward(q, k, v, mask, scale=self.scale, running=(out, lse), backend=self.backend)

    def merge(self, operation):
        out, lse = self.views[operation.into]
        part_out, part_lse = self.packs[operation.part]
        part_out = part_out.narrow(1, operation.start, operation.num_rows)  # [b, rows, h, d]
        part_lse = part_lse.narrow(2, operation.start, operation.num_rows)  # [b, h, rows]
        merge_(out, lse, part_out[None], part_lse[None])  # one part: [1, b, s, h, d] and [1, b, h, s]

    def clear(self, packs):
        packs[1].fill_(-torch.inf)  # out is not read where lse is -inf


class _Backward(_Run):
    """Backward of one rank: results are dQ for queries and (dK, dV) for keys, merged by addition."""

    def __init__(
        self, spec: AttentionSpec, plan: CompiledPlan, transport: Transport, scale: float | None,
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    ) -> None:  # fmt: skip
        self.dq, self.dk, self.dv = zeros_fp32(q), zeros_fp32(k), zeros_fp32(v)
        own: dict[Side, list[Tensor]] = {"queries": [q, dout, lse, row_delta(dout, out)], "keys": [k, v]}
        super().__init__(spec, plan, transport, scale, own, {"queries": [self.dq], "keys": [self.dk, self.dv]})

    def compute(self, operation):
        (q, dout, lse, delta), (k, v), (dq,), (dk, dv) = (self.views[slot] for slot in operation[1:])
        mask, into = self.masks[operation.tile], (dq, dk, dv)
        attention_backward(dout, q, k, v, lse, delta, mask, scale=self.scale, into=into, backend=self.backend)

    def merge(self, operation):
        totals, (pack,) = self.views[operation.into], self.packs[operation.part]
        pack = pack.narrow(1, operation.start, operation.num_rows)  # [b, rows, h, d]; dk, dv: [b, rows, 2, h, d]
        for total, part in zip(totals, pack.unbind(2) if len(totals) > 1 else (pack,), strict=True):
            total.add_(part)

    def clear(self, packs):
        packs[0].zero_()


def _sum_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of sums and of stats: fp32, or fp64 for inputs q in fp64."""
    return torch.promote_types(q.dtype, torch.float32)


def _rows_of(x: Tensor, dim: int, rows: Rows) -> Tensor:
    """Return some rows of a tensor along a dim, contiguous: `[..., s, ...]` -> `[..., rows, ...]`."""
    parts = [x.narrow(dim, start, stop - start) for start, stop in rows]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def _packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the packs of n tensors `[b, s, h, d]` and of n `[b, h, s]`: contiguous, copied where n > 1.

    They are `[b, s, n, h, d]` and `[b, n, h, s]`, without n where it is 1.
    """
    kinds = [[x for x in tensors if x.dim() == dim] for dim in (4, 3)]
    # At dim -3: before h, d, and before h, s.
    return [torch.stack(of, -3) if len(of) > 1 else of[0].contiguous() for of in kinds if of]
