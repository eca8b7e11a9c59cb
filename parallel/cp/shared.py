"""Attention over a process group for any trainer: sequences that its ranks share, divided, attended to and gathered."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.layout import SeqLayout
from .attention import context_attention
from .grid import CpGrid, Layout
from .group import CommunicatorOptions, CpGroup, open_group
from .packed import divided
from .spec import AttentionSpec
from .visible import Visibility


class ContextParallel:
    """The ranks of a process group that share sequences: context parallelism by one grid. Collective.

    `group` is a process group of torch (None: all ranks), and `grid` divides attention among its ranks. `layout` says
    how the tokens of a sequence with several documents are divided; one document is always in zigzag, which gives all
    ranks equal work under full attention. `backend` names the attention kernels (`longring.attention`); with
    `narrow_results` partial results travel in the dtype of q, otherwise in fp32. The constructor opens the channels
    between the ranks, which stay open as long as torch.distributed: make one for each group and keep it. Raises
    ValueError if the grid is not of the group's size, if there is no such layout, or if torch.distributed was
    initialized with `device_id`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        grid: CpGrid,
        *,
        layout: Layout = "zigzag",
        backend: str = "auto",
        narrow_results: bool = True,
        options: CommunicatorOptions | None = None,
    ) -> None:
        world = dist.group.WORLD
        if world is None:
            raise ValueError(
                "ContextParallel: torch.distributed is not initialized; call torch.distributed.init_process_group()"
            )
        if world.bound_device_id is not None:
            raise ValueError(
                f"init_process_group: device_id = {world.bound_device_id}: new groups would wait for all ranks of the "
                "world; leave device_id out, and call torch.cuda.set_device before"
            )
        self.process_group = group or world
        ranks = dist.get_process_group_ranks(self.process_group)
        if grid.size != len(ranks):
            raise ValueError(
                f"grid = {grid}: is for {grid.size} ranks, and the process group has {len(ranks)}; pass a grid of that "
                f"size, such as CpGrid.ring({len(ranks)})"
            )
        if layout not in get_args(Layout):
            raise ValueError(
                f"layout = {layout!r}: must be one of {', '.join(get_args(Layout))}; leave it out for zigzag"
            )
        self.grid = grid
        self._group = open_group(ranks, [grid], options)
        self._layout: Layout = layout
        self._backend = backend
        self._narrow_results = narrow_results

    @property
    def rank(self) -> int:
        """Index of this rank in the process group."""
        return self._group.rank

    @property
    def size(self) -> int:
        """Number of ranks that share a sequence."""
        return self._group.size

    def sequence(
        self,
        num_tokens: int,
        document_starts: Sequence[int] = (0,),
        *,
        causal: bool = True,
        windows: Sequence[int | None] = (None,),
    ) -> SharedSequence:
        """Return a sequence of `num_tokens` that the ranks share, with its division among them.

        `document_starts` ascend from 0: attention keeps the documents that begin there apart. Plans and masks are made
        here, on the host, for layers of each of `windows` (an attention window in tokens, None for full attention): any
        thread may call this, and all layers and passes over the same documents use one result. Every rank makes it from
        the same arguments. Raises ValueError if there are fewer than 2 tokens a rank, if the starts are not integers
        that ascend from 0 to below `num_tokens`, or for no windows, one below 1 or one without causal order.
        """
        try:
            # Integers of any kind; with floats the compiled loops of layouts would write beyond their arrays.
            starts = tuple(index(start) for start in document_starts)
        except TypeError as error:
            raise ValueError(f"document_starts: {error}: must be integers; convert them to int") from error
        if len(starts) > 1 and starts[-1] >= num_tokens:
            raise ValueError(
                f"document_starts: {starts[-1]}: must be below num_tokens = {num_tokens}; leave out documents that "
                "begin behind the end"
            )
        if not windows:
            raise ValueError("windows = (): must name one at least; leave it out for full attention")
        # Work differs between layers of different windows: each counts as one layer.
        counted = tuple((window, 1) for window in windows)
        runs = divided(self._layout, num_tokens, starts, self.size, counted)
        layouts = tuple(SeqLayout(of_rank, starts) for of_rank in runs)
        specs = {
            window: AttentionSpec(self.grid, layouts, Visibility(causal, window), self._backend, self._narrow_results)
            for window in windows
        }
        for spec in specs.values():
            spec.prepare(self.rank, pin_memory=dist.get_backend(self.process_group) == "nccl")
        return SharedSequence(self._group, self.process_group, layouts, specs)


class SharedSequence:
    """A sequence, or a batch of sequences with the same documents, whose tokens the ranks of a group share.

    `ContextParallel.sequence` makes it.
    """

    def __init__(
        self,
        group: CpGroup,
        process_group: dist.ProcessGroup,
        layouts: tuple[SeqLayout, ...],
        specs: dict[int | None, AttentionSpec],
    ) -> None:
        self._group = group
        self._process_group = process_group
        self._specs = specs
        self.layouts = layouts
        """Positions that each rank holds, in the order of the group."""

    @property
    def layout(self) -> SeqLayout:
        """Positions that this rank holds; `layout.positions()` are those for RoPE."""
        return self.layouts[self._group.rank]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the whole sequence."""
        return sum(layout.num_tokens for layout in self.layouts)

    def shard(self, whole: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part of a tensor that has all tokens along `dim`: tokens, targets, positions or states.

        `whole` is `[..., num_tokens, ...]`, the result `[..., layout.num_tokens, ...]`. Raises ValueError if
        `whole` has another number of tokens.
        """
        if whole.shape[dim] != self.num_tokens:
            raise ValueError(
                f"shard: the tensor has {whole.shape[dim]} tokens along dim {dim}: must have the {self.num_tokens} of "
                "the sequence; pass the dim of the tokens"
            )
        parts = [whole.narrow(dim, start, stop - start) for start, stop in self.layout.runs]
        return torch.cat(parts, dim)

    def unshard(self, part: Tensor, dim: int = 1) -> Tensor:
        """Return the whole of a tensor of which each rank has its part along `dim`, on all ranks. Collective.

        `part` is `[..., layout.num_tokens, ...]`, the result `[..., num_tokens, ...]`. It is not differentiable: a loss
        is computed on each rank's own tokens, and summed. Raises ValueError if the part has another number of tokens
        than the rank holds.
        """
        if part.shape[dim] != self.layout.num_tokens:
            raise ValueError(
                f"unshard: the tensor has {part.shape[dim]} tokens along dim {dim}: must have the "
                f"{self.layout.num_tokens} that this rank holds; pass the dim of the tokens"
            )
        first = part.detach().movedim(dim, 0)  # [s, ...]
        # Ranks hold numbers of tokens that differ by a few, and all_gather needs equal sizes.
        rows = max(layout.num_tokens for layout in self.layouts)
        padded = first.new_zeros(rows, *first.shape[1:])  # [rows, ...]
        padded[: len(first)] = first
        gathered = [torch.empty_like(padded) for _ in self.layouts]
        dist.all_gather(gathered, padded, group=self._process_group)
        whole = first.new_empty(self.num_tokens, *first.shape[1:])  # [num_tokens, ...]
        for layout, found in zip(self.layouts, gathered, strict=True):
            whole[layout.positions(whole.device)] = found[: layout.num_tokens]
        return whole.movedim(0, dim).contiguous()

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
    ) -> Tensor:
        """Return the self-attention `[b, s, h_q, d]` of the whole sequence at this rank's tokens. Collective.

        q `[b, s, h_q, d]` and k, v `[b, s, h_kv, d]` are those of the tokens that this rank holds, in order; RoPE has
        been applied. Scores are q k `scale` (default: d^-1/2). Differentiable in q, k and v. Raises ValueError if the
        shapes or heads do not fit, or if the sequence was not made for layers of this window, and PeerError if another
        rank is gone or does not answer.
        """
        if window not in self._specs:
            raise ValueError(
                f"attention: window = {window}: the sequence was made for windows = {list(self._specs)}; add it there"
            )
        return context_attention(q, k, v, self._specs[window], self._group, scale=scale)
