"""The meeting point of the columns: the model gets its attention from parallel/ and its rows from data/."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from ..kernels.attention import attention, launch_all
from ..kernels.layout import SeqLayout
from ..kernels.mask import Mask, host_masks
from ..model.attention import AttentionFunction
from ..model.fused import fused_ops
from ..model.loss import slice_softmax
from ..model.transformer import Transformer
from ..model.weights import fill_weights
from ..parallel.cp.attention import context_attention
from ..parallel.cp.choose_layout import LayersOf, LayoutPricer
from ..parallel.cp.cost import Speed
from ..parallel.cp.execute import AttentionSpec
from ..parallel.cp.grid import CpGrid
from ..parallel.cp.group import CpGroup, open_rings
from ..parallel.cp.packed import Runs, divided
from ..parallel.cp.topology import Topology
from ..parallel.cp.visible import Visibility
from ..parallel.mesh import Mesh, megatron_config
from ..parallel.world import World
from ..parallel.zero import DeepSpeedEngine, partition_new, zero_engine
from .attention_backends import with_backends
from .config import Recipe
from .grids.choice import LayerKind, attention_shape
from .grids.decide import decide_grids, decide_links
from .guards import check_attention
from .together import on_all_ranks


@dataclass(frozen=True)
class BucketLayout:
    """Division of the sequences of one bucket among ranks, and this rank's share of them."""

    context_parallel: int
    """Number of ranks that share a sequence."""
    replica: int
    """Index of this rank's replica."""
    num_replicas: int
    """Number of replicas."""
    sequences_per_replica: int
    """Number of sequences of a micro-batch on each replica."""
    length: int
    """Number of tokens of a sequence."""
    index: int
    """Index of this rank among the ranks that share a sequence."""
    divide: Callable[[tuple[int, ...]], Sequence[Runs]]
    """Function of the document starts of a sequence: positions that each rank of the replica holds."""
    document_masks: bool
    """Whether attention keeps the documents of a sequence apart."""
    position_resets: bool
    """Whether RoPE counts positions from the start of each document."""
    attention: Callable[[tuple[SeqLayout, ...]], AttentionFunction]
    """Function that returns attention over sequences of these layouts, one for each rank of the replica, with its plans
    and masks made; any thread may call it."""

    def prepare(
        self, num_rows: int, document_starts: Sequence[tuple[int, ...]] | None
    ) -> tuple[SeqLayout, AttentionFunction]:
        """Return layout and attention of a micro-batch of `num_rows` sequences, all that the host must compute for it.

        With `document_starts`, a tuple a row, whole sequences are laid end to end as one, because a batch shares one
        mask. Positions run on from row to row: RoPE depends on distances only.
        """
        starts, whole_rows, divide = (0,), (0,), self.divide
        if document_starts is not None and self.context_parallel > 1:
            [starts] = document_starts  # the ranks of a ring hold one sequence at a time
        elif document_starts is not None:
            # Each document start moves by the position of its row in the joined sequence.
            num_tokens = num_rows * self.length
            whole_rows, divide = tuple(range(0, num_tokens, self.length)), lambda _: [((0, num_tokens),)]
            starts = tuple(
                row + start for row, found in zip(whole_rows, document_starts, strict=True) for start in found
            )
        documents = starts if self.document_masks else whole_rows
        resets = starts if self.position_resets else (0,)
        layouts = tuple(SeqLayout(runs, documents, resets) for runs in divide(documents))  # [rank of the replica]
        return layouts[self.index], self.attention(layouts)

    def positions(self, layout: SeqLayout, device: torch.device) -> Tensor:
        """Return the positions in a sequence that this rank holds of each, `[s]`; `layout` is that of `prepare`."""
        return torch.arange(self.length, device=device) if self.context_parallel == 1 else layout.positions(device)

    def model_inputs(
        self,
        rows: NDArray[np.unsignedinteger],
        document_starts: Sequence[tuple[int, ...]] | None,
        device: torch.device,
        prepared: tuple[SeqLayout, AttentionFunction] | None = None,
    ) -> tuple[Tensor, Tensor, SeqLayout, AttentionFunction]:
        """Return tokens, targets, layout and attention for this rank's share of `rows` `[b, length + 1]`.

        Tokens and targets are `[b, s]` with s tokens of each sequence on this rank, or `[1, b s]` where `prepare` has
        laid the sequences end to end. `prepared` is the result of `prepare` for these rows; None: it is called here.
        """
        layout, attention = prepared or self.prepare(len(rows), document_starts)
        # Whole rows are copied as stored: from page-locked memory, the copy does not block.
        whole = torch.from_numpy(rows).to(device, non_blocking=True).long()  # [b, length + 1]
        positions = self.positions(layout, device)
        shape = (-1, layout.num_tokens)
        # [b, s] before they are reshaped; the target at a position is the token at the next.
        return whole[:, positions].reshape(shape), whole[:, positions + 1].reshape(shape), layout, attention

    def trained(self, trained: NDArray[np.bool_] | None, losses: Tensor, layout: SeqLayout) -> Tensor:
        """Return 1 where a loss counts and 0 elsewhere, in the shape of `losses`, the losses under `layout`.

        `trained` `[b, length]` marks the targets of whole sequences; None counts all.
        """
        if trained is None:
            return torch.ones_like(losses)
        positions = self.positions(layout, losses.device)
        on_device = torch.from_numpy(trained).to(losses.device, non_blocking=True)  # [b, length]
        return on_device[:, positions].to(losses.dtype).view_as(losses)  # [b, s], or [1, b s] as in `prepare`


def open_layouts(
    recipe: Recipe,
    mesh: Mesh,
    lengths: Sequence[int],
    at: Callable[[str], None],
    console: Console | None = None,
    attention_file: Path | None = None,
) -> dict[int, BucketLayout]:
    """Return the layout of the buckets of these lengths, once their kernels are compiled and grids chosen. Collective.

    `at` is called with each operation as it begins; rank 0 prints backends and grids to `console`, and keeps the
    backends in `attention_file` for later starts. Raises ValueError and CommonError as `with_backends`, `decide_grids`
    and `bucket_layouts` do.
    """
    # First, since probe and guards launch some of them: all ranks of a node would compile these at once.
    at("measuring attention backends")
    recipe = with_backends(recipe, mesh, lengths, console, attention_file)
    at("compiling kernels")
    compile_kernels(recipe, mesh, lengths)
    at("dividing attention among ranks")
    return bucket_layouts(recipe, mesh, lengths, decide_grids(recipe, mesh, lengths, console))


def bucket_layouts(
    recipe: Recipe, mesh: Mesh, lengths: Sequence[int], grids: Mapping[LayerKind, CpGrid]
) -> dict[int, BucketLayout]:
    """Return the layout of the buckets of these lengths, and open the process groups that they need. Collective.

    `grids` has the grid of every layer kind that is spread over ranks. Raises ValueError, on every rank, if
    attention over several ranks differs from attention on one, or if a ring cannot open its copies.
    """
    # A fault within one ring, which may have no rank that prints, is an error of all ranks.
    opened = partial(open_rings, mesh.neighbours, grids.values(), mesh.communicator_options)
    groups = on_all_ranks(mesh, opened) if grids else {}
    all_windows = {recipe.model.attention_window(layer) for layer in range(recipe.model.num_layers)}
    whole = attention_on_one_rank(recipe.train.attention_backend, mesh.device, all_windows)
    # Loader threads price layouts, or keep documents on nodes, without talking to other ranks. All ranks use the same
    # links, so that all find the same division.
    links = decide_links(recipe, mesh) if recipe.parallel.cp.layout in ("auto", "documents") and grids else None
    layouts = {}
    for length in lengths:
        degree = recipe.parallel.context_parallel(length)
        if degree == 1:
            index, attention = 0, lambda layouts: whole(*layouts)
            divide: Callable[[tuple[int, ...]], Sequence[Runs]] = partial(divided, "zigzag", length, size=1)
        else:
            group = groups[degree]
            windows = {kind.window: grid for kind, grid in grids.items() if kind.sequence_tokens == length}
            index, attention = group.rank, attention_over_ranks(recipe, mesh.device, group, windows)
            divide = _division(recipe, length, windows, links)
            if recipe.parallel.cp.guards:
                check_attention(recipe, mesh, group, attention, whole)
        layouts[length] = BucketLayout(
            context_parallel=degree,
            replica=mesh.data_rank // degree,  # a ring is an aligned run of the data axis
            num_replicas=mesh.data_size // degree,
            sequences_per_replica=recipe.parallel.sequences_per_replica(length),
            length=length,
            index=index,
            divide=divide,
            document_masks=recipe.order.mode == "off" or recipe.order.document_masks,
            position_resets=recipe.order.position_resets,
            attention=attention,
        )
    return layouts


def _division(
    recipe: Recipe, length: int, windows: Mapping[int | None, CpGrid], links: tuple[Topology, Speed] | None
) -> Callable[[tuple[int, ...]], Sequence[Runs]]:
    """Return the function that divides sequences by their documents.

    `links` are the links and the speed by which layouts are priced; "documents" only takes the ranks per node from
    them.
    """
    layout, size = recipe.parallel.cp.layout, recipe.parallel.context_parallel(length)
    # attention window → number of layers
    of_layers = Counter(recipe.model.attention_window(layer) for layer in range(recipe.model.num_layers))
    if layout != "auto":
        per_node = links[0].ranks_per_node if links else None
        return partial(divided, layout, length, size=size, windows=tuple(of_layers.items()), ranks_per_node=per_node)
    assert links is not None, "auto prices layouts on links"
    layers = tuple(LayersOf(windows[window], window, number) for window, number in of_layers.items())
    return LayoutPricer(length, layers, attention_shape(recipe), *links).choose


def compile_kernels(recipe: Recipe, mesh: Mesh, lengths: Sequence[int]) -> None:
    """Launch every Triton kernel of a run with buckets of these lengths, so that no step compiles one. Collective.

    One rank of each node goes first; the others then find its kernels in the cache that they share.
    """
    launch, is_first = partial(_launch_kernels, recipe, mesh, lengths), World.from_environment().local_rank == 0
    # Each round ends in a collective, which all ranks enter, whether they launch or not.
    for is_mine in (is_first, not is_first):
        on_all_ranks(mesh, launch if is_mine else lambda: None)


def _launch_kernels(recipe: Recipe, mesh: Mesh, lengths: Sequence[int]) -> None:
    model, dtype = recipe.model, getattr(torch, recipe.train.dtype)
    heads = model.num_heads // mesh.tensor_size, model.num_kv_heads // mesh.tensor_size
    launch_all(*heads, model.head_dim, dtype, mesh.device, recipe.train.attention_backend)
    # liger's kernels are compiled for numbers of sequences and tokens: [b, s], or [1, b s] where sequences are packed.
    shapes = {
        (recipe.parallel.sequences_per_replica(length), length // recipe.parallel.context_parallel(length))
        for length in lengths
    }
    tensor = mesh.tensor_size
    for b, s in shapes | {(1, b * s) for b, s in shapes}:

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=mesh.device, requires_grad=True)

        x = zeros(s // tensor if recipe.parallel.sequence_parallel else s, b, model.hidden_size)
        gate_up = zeros(s, b, 2 * model.ffn_hidden_size // tensor)
        q, k = (zeros(b, s, heads // tensor, model.head_dim) for heads in (model.num_heads, model.num_kv_heads))
        angles = zeros(s, model.head_dim // 2, of=torch.float32).detach()
        normed = {"none": (), "head": (q, k), "projection": (q.flatten(2), k.flatten(2))}[model.qk_norm]
        ops = fused_ops(x)
        results = ops.rms_norm(x, zeros(model.hidden_size), model.norm_epsilon), ops.swiglu(gate_up)
        results += ops.rope(q.clone(), k.clone(), (angles, angles))  # clones: RoPE may overwrite what it is given
        results += tuple(ops.rms_norm(y, zeros(y.shape[-1]), model.norm_epsilon) for y in normed)
        torch.autograd.backward(results, [torch.zeros_like(y) for y in results])
    logits = torch.zeros(1, 8, dtype=dtype, device=mesh.device)
    rows = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    softmax = slice_softmax(logits.t())  # of a head of 8 rows
    softmax.gradient(logits, True, rows, 8, *softmax.sums(logits, rows, 8))


def attention_on_one_rank(
    backend: str, device: torch.device, windows: Collection[int | None]
) -> Callable[[SeqLayout], AttentionFunction]:
    """Return attention over sequences that this rank holds whole, for layers of some attention windows."""

    @lru_cache(maxsize=16)  # micro-batches without documents have one layout a bucket
    def attention_of(layout: SeqLayout) -> AttentionFunction:
        tile, pin_memory = [(layout, layout)], device.type == "cuda"
        prepared = {window: host_masks(tile, window=window, pin_memory=pin_memory) for window in windows}
        masks: dict[int | None, Mask] = {}  # by attention window, made by the first layer that has it

        def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            if window not in masks:
                [masks[window]] = prepared[window].on(device)
            return attention(q, k, v, masks[window], backend=backend)

        return attend

    return attention_of


def attention_over_ranks(
    recipe: Recipe, device: torch.device, group: CpGroup, windows: Mapping[int | None, CpGrid]
) -> Callable[[tuple[SeqLayout, ...]], AttentionFunction]:
    """Return attention over sequences spread over a group, by the grid of each attention window."""

    @lru_cache(maxsize=1)  # all micro-batches without documents have one layout
    def attention_of(layouts: tuple[SeqLayout, ...]) -> AttentionFunction:
        backend, narrow = recipe.train.attention_backend, recipe.parallel.cp.narrow_results
        specs = {
            window: AttentionSpec(grid, layouts, Visibility(window=window), backend, narrow)
            for window, grid in windows.items()
        }
        for spec in specs.values():
            spec.prepare(group.rank, pin_memory=device.type == "cuda")

        def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            return context_attention(q, k, v, specs[window], group)

        return attend

    return attention_of


def build_engine(recipe: Recipe, vocab_size: int, mesh: Mesh) -> DeepSpeedEngine:
    """Return the model and its optimizer under DeepSpeed. Equal seeds give equal weights on any mesh. Collective.

    Raises ValueError if the ranks of the mesh cannot train the recipe.
    """
    train = recipe.train
    layers = megatron_config(recipe.parallel, train.deterministic)
    model = Transformer(recipe.model, vocab_size, layers, train.memory)
    # Norm weights, the only vectors, do not decay. They are found here because ZeRO 3 leaves only flat parts.
    vectors = {name for name, p in model.named_parameters() if p.dim() <= 1}
    partition = partial(partition_new, parallel=recipe.parallel, mesh=mesh, dtype=train.dtype)
    fill_weights(model, recipe.model, train.seed, mesh.device, getattr(torch, train.dtype), partition)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in parameters.items() if name not in vectors]},
            {"params": [p for name, p in parameters.items() if name in vectors], "weight_decay": 0.0},
        ],
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        weight_decay=train.weight_decay,
        # On the host the default, a loop over parameters, would pass over each of them many times.
        fused="cpu" in (mesh.device.type, recipe.parallel.zero.offload_optimizer) or None,
    )
    return zero_engine(
        model,
        optimizer,
        recipe.parallel,
        mesh,
        accumulation_steps=recipe.accumulation_steps(mesh.world_size),
        clip_grad_norm=train.clip_grad_norm,
        dtype=train.dtype,
        gradient_dtype=train.gradient_dtype,
    )
