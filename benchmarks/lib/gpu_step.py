"""Sections of one rank: a training step of a model of about 1B parameters, and what a step consists of."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from longring.kernels.attention import attention
from longring.kernels.compilations import Compilations
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask
from longring.launch.attention_backends import with_backends
from longring.launch.build import BucketLayout, bucket_layouts, build_engine, compile_kernels
from longring.launch.config import Recipe, load_recipe
from longring.launch.flops import peak_flops
from longring.model.config import MemoryConfig
from longring.model.fused import fused_ops
from longring.model.rope import rope_table
from longring.parallel.mesh import Mesh, join
from longring.parallel.zero import DeepSpeedEngine, set_learning_rate
from torch import Tensor

from .gpu_training import RECIPE
from .mfu import mfu
from .one_rank import be_the_only_rank
from .script import Row, Size
from .timing import elapsed_ms, moment, synchronize

TIMED = 3
"""Timed micro-batches, after one that compiles."""


class Sizes(NamedTuple):
    """The model and the tokens of a micro-batch."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    tokens: int
    lengths: tuple[int, ...]
    """Bucket lengths: the same tokens, cut into sequences."""
    packings: int
    """Number of random packings of documents."""


SIZES: dict[Size, Sizes] = {
    "full": Sizes(16, 2048, 16, 8, 6144, 131_072, 16_384, (1024, 4096, 16_384), 40),
    "quick": Sizes(4, 1024, 8, 4, 3072, 32_768, 4096, (1024, 4096), 10),
    "smallest": Sizes(2, 64, 4, 2, 192, 512, 128, (32, 128), 3),
}


class Ready(NamedTuple):
    """A model on one rank under DeepSpeed, over NCCL on a GPU."""

    sizes: Sizes
    recipe: Recipe
    mesh: Mesh
    engine: DeepSpeedEngine
    layouts: dict[int, BucketLayout]

    @property
    def device(self) -> str:
        """Type of the device."""
        return self.mesh.device.type

    @property
    def model(self) -> Any:
        """The model without its engine, a `Transformer`."""
        return self.engine.module

    def inputs(self, length: int, document_starts: list[tuple[int, ...]] | None = None) -> tuple[Any, ...]:
        """Return the inputs of a micro-batch of random tokens in sequences of `length`."""
        rows = np.random.default_rng(0).integers(0, self.sizes.vocabulary, (self.sizes.tokens // length, length + 1))
        return self.layouts[length].model_inputs(rows.astype(np.uint32), document_starts, self.mesh.device)

    def take(self, memory: MemoryConfig) -> None:
        """Let the layers of the model keep, recompute or offload their activations."""
        self.model.memory = memory
        for block in self.model.blocks:
            block.activations, block.mlp.tile_tokens = memory.activations, memory.mlp_tile_tokens

    def both_passes(self, inputs: tuple[Any, ...]) -> None:
        """Run forward and backward of a micro-batch."""
        self.engine.backward(self.engine(*inputs).mean())


def make_ready(size: Size) -> Ready:
    """Return the model of a size on this process's rank, the only one."""
    be_the_only_rank()
    sizes = SIZES[size if torch.cuda.is_available() else "smallest"]
    recipe = load_recipe(
        RECIPE,
        [
            *(f"model.num_layers={sizes.layers}", f"model.hidden_size={sizes.hidden}"),
            *(f"model.num_heads={sizes.heads}", f"model.num_kv_heads={sizes.kv_heads}"),
            *(f"model.ffn_hidden_size={sizes.ffn}", "train.dtype=bfloat16"),
            *(f"parallel.tokens_per_rank={sizes.tokens}", f"data.max_bucket_tokens={sizes.tokens}"),
            *(f"data.min_bucket_tokens={min(sizes.lengths)}", "data.method=best_fit"),
            # Two micro-batches a step: the engine then accumulates, as it does in training.
            f"train.global_batch_tokens={2 * sizes.tokens}",
        ],
    )
    mesh = join(recipe.parallel, 1)
    engine = build_engine(recipe, sizes.vocabulary, mesh)
    set_learning_rate(engine, 1e-4)
    return Ready(sizes, recipe, mesh, engine, bucket_layouts(recipe, mesh, sizes.lengths, {}))


def step_rows(size: Size) -> Iterator[Row]:
    """Yield the parts of a training step of one rank, buckets by length and by what is kept, then the rest."""
    started = time.perf_counter()
    ready = make_ready(size)
    note = f"{sum(p.numel() for p in ready.model.parameters()) / 1e9:.2f}B parameters"
    if ready.device == "cuda" and peak_flops(name := torch.cuda.get_device_name()) is None:
        note += f"; no MFU, since the peak FLOP/s of {name} are not known here"
    yield {"part": "start of DeepSpeed and the mesh", "ms": 1e3 * (time.perf_counter() - started), "note": note}
    started = time.perf_counter()
    compile_kernels(ready.recipe, ready.mesh, list(ready.layouts))
    yield {"part": "kernels compiled before the first step", "ms": 1e3 * (time.perf_counter() - started)}
    yield product_row(ready)
    whole_ms = None
    longest, *others = reversed(ready.sizes.lengths)
    tile = ready.sizes.tokens // 4
    for memory in (
        *(MemoryConfig(activations=level) for level in ("keep", "recompute_mlp", "recompute_layer", "offload")),
        *(MemoryConfig(activations=level, mlp_tile_tokens=tile) for level in ("keep", "recompute_layer")),
    ):
        tiles = f", tiles of {tile}" if memory.mlp_tile_tokens else ""
        for length in [longest, *(others if memory == MemoryConfig() else [])]:
            part = f"bucket {length}, {memory.activations}{tiles}"
            yield (row := attempt(part, partial(bucket_row, ready, length, memory)))
            whole_ms = whole_ms or row.get("ms")
    ready.take(MemoryConfig())
    yield attempt("optimizer step", partial(optimizer_row, ready))
    yield attempt("loss head, no logits kept", partial(head_row, ready, 0))
    head = attempt("loss head", partial(head_row, ready, 10**11))
    if whole_ms and head.get("ms"):
        head["note"] = f"loss head: {head['ms'] / whole_ms:.0%} of a micro-batch of the longest bucket"
    yield head
    yield attempt("documents", partial(documents_row, ready))
    yield from layer_rows(ready)
    yield attempt(f"bucket {longest}, keep, fastest attention backends", partial(fastest_row, ready, longest))
    yield from operator_rows(ready)


def fastest_row(ready: Ready, length: int) -> Row:
    """Return the row of a micro-batch whose attention is by the fastest backend of each kind of tile."""
    recipe = with_backends(ready.recipe, ready.mesh, [length])
    layouts = bucket_layouts(recipe, ready.mesh, [length], {})
    row = bucket_row(ready._replace(recipe=recipe, layouts=layouts), length, MemoryConfig())
    return row | {"note": f"attention: {recipe.train.attention_backend}"}


def attempt(part: str, row: Callable[[], Row]) -> Row:
    """Return a row, or one that says that the memory was not enough."""
    try:
        return {"part": part, **row()}
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"part": part, "right": False, "note": f"{part}: {str(error).splitlines()[0][:120]}"}


def timed_ms(ready: Ready, work: Callable[[], object]) -> tuple[float, float]:
    """Return the ms of a call on the device, and those after which the host was done with it; the median of `TIMED`."""
    work()
    found = []
    for _ in range(TIMED):
        synchronize(ready.device)
        begin, first = time.perf_counter(), moment(ready.device)
        work()
        host, last = time.perf_counter() - begin, moment(ready.device)
        synchronize(ready.device)
        found.append((elapsed_ms(first, last), 1e3 * host))
    return sorted(found)[TIMED // 2]


def product_row(ready: Ready) -> Row:
    """Return the rate of one large matrix product, the yardstick of every other rate here."""
    n = 8192 if ready.device == "cuda" else 256
    a, b = torch.randn(2, n, n, device=ready.mesh.device).to(torch.bfloat16)
    ms, _ = timed_ms(ready, lambda: a @ b)
    return {"part": f"product of {n} x {n}", "ms": ms, "TFLOPs": 2 * n**3 / ms / 1e9} | mfu(2 * n**3 / ms * 1e3)


def flops_of(ready: Ready, length: int) -> float:
    """Return the FLOPs of forward and backward of a micro-batch: products of weights, and attention's visible pairs."""
    sizes = ready.sizes
    weights = sum(p.numel() for name, p in ready.model.named_parameters() if p.dim() > 1 and "embedding" not in name)
    pairs = sizes.tokens * (length + 1) / 2
    return 6.0 * weights * sizes.tokens + 3 * 4.0 * sizes.hidden * pairs * sizes.layers


def bucket_row(ready: Ready, length: int, memory: MemoryConfig) -> Row:
    """Return the row of a micro-batch of one bucket: time, rate, and peak memory beyond weights and optimizer."""
    ready.take(memory)
    inputs = ready.inputs(length)
    ready.both_passes(inputs)
    before = None
    if ready.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    ms, host_ms = timed_ms(ready, lambda: ready.both_passes(inputs))
    row: Row = {"ms": ms, "host_ms": host_ms, "tokens_per_s": ready.sizes.tokens / ms * 1e3}
    rate = flops_of(ready, length) / ms * 1e3
    row |= {"TFLOPs": rate / 1e12} | mfu(rate)
    if before is not None:
        row["bytes_a_token"] = (torch.cuda.max_memory_allocated() - before) // ready.sizes.tokens
    return row


def optimizer_row(ready: Ready) -> Row:
    """Return the row of a whole step: two micro-batches and the update of all weights."""
    inputs = ready.inputs(max(ready.sizes.lengths))

    def step() -> None:
        for _ in range(ready.engine.gradient_accumulation_steps()):
            ready.both_passes(inputs)
            ready.engine.step()

    ms, host_ms = timed_ms(ready, step)
    return {"ms": ms, "host_ms": host_ms, "note": "optimizer step: two micro-batches and the update"}


def head_row(ready: Ready, kept_logit_bytes: int) -> Row:
    """Return the row of the loss head alone, forward and backward of one micro-batch."""
    ready.model.head.kept_logit_bytes = kept_logit_bytes
    sizes = ready.sizes
    x = torch.randn(sizes.tokens, 1, sizes.hidden, device=ready.mesh.device).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(sizes.vocabulary, (1, sizes.tokens), device=ready.mesh.device)
    weight = ready.model.head.weight

    def both() -> None:
        torch.autograd.grad(ready.model.head(x, targets).sum(), (x, weight))

    ms, host_ms = timed_ms(ready, both)
    flops = 6.0 * sizes.tokens * sizes.hidden * len(weight)
    return {"ms": ms, "host_ms": host_ms, "TFLOPs": flops / ms / 1e9} | mfu(flops / ms * 1e3)


def documents_row(ready: Ready) -> Row:
    """Return the row of random packings of documents, and the number of kernels that they compiled."""
    length, draw = max(ready.sizes.lengths), random.Random(0)
    times: list[float] = []
    with Compilations() as compiled:
        for _ in range(ready.sizes.packings):
            count = draw.randrange(1, 30)
            starts = (0, *sorted(draw.sample(range(1, length), count)))
            synchronize(ready.device)
            begin = time.perf_counter()
            ready.both_passes(ready.inputs(length, [starts]))
            synchronize(ready.device)
            times.append(1e3 * (time.perf_counter() - begin))
    return {
        "ms": sorted(times)[len(times) // 2],
        "slowest_ms": max(times),
        "compiled": compiled.count,
        "right": not compiled.count,
    }


def layer_rows(ready: Ready) -> Iterator[Row]:
    """Yield forward and backward of one layer: as it is, compiled by torch, and as a CUDA graph."""
    sizes, device = ready.sizes, ready.mesh.device
    block: Any = ready.model.blocks[0]
    layout = SeqLayout.contiguous(sizes.tokens)
    mask = make_mask(layout, layout, device=device)
    rope = rope_table(layout.rotary_positions(device), sizes.hidden // sizes.heads, 1e5)
    x = torch.randn(sizes.tokens, 1, sizes.hidden, device=device).to(torch.bfloat16).requires_grad_()
    dout = torch.randn_like(x)
    weights = [x, *block.parameters()]

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return attention(q, k, v, mask)

    def passes(layer: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x, rope, attend), weights, dout)

    def captured() -> Callable[[], object]:
        if ready.device != "cuda":
            return lambda: passes(block)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                passes(block)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            passes(block)
        return graph.replay

    # Inductor compiles for half a minute on a CPU, where nothing is to be learnt of it.
    backend = "inductor" if ready.device == "cuda" else "eager"
    kinds: dict[str, Callable[[], Callable[[], object]]] = {
        "layer": lambda: partial(passes, block),
        "layer, compiled": lambda: partial(passes, torch.compile(block, backend=backend)),
        "layer, CUDA graph": captured,
    }
    for part, make in kinds.items():
        yield tried_row(ready, part, make)


def tried_row(ready: Ready, part: str, make: Callable[[], Callable[[], object]]) -> Row:
    """Return the row of a call that torch may refuse in any way; what it would replace has been measured."""
    try:
        ms, host_ms = timed_ms(ready, make())
    except Exception as error:
        return {"part": part, "note": f"{part}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
    return {"part": part, "ms": ms, "host_ms": host_ms}


def operator_rows(ready: Ready) -> Iterator[Row]:
    """Yield forward and backward of each operator of model/fused.py: as training takes it, and compiled by torch."""
    sizes, device = ready.sizes, ready.mesh.device
    head_dim = sizes.hidden // sizes.heads

    def inputs(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_()

    x, weight, gate_up = (
        inputs(sizes.tokens, 1, sizes.hidden),
        inputs(sizes.hidden),
        inputs(sizes.tokens, 2 * sizes.ffn),
    )
    q, k = inputs(1, sizes.tokens, sizes.heads, head_dim), inputs(1, sizes.tokens, sizes.kv_heads, head_dim)
    table = rope_table(SeqLayout.contiguous(sizes.tokens).rotary_positions(device), head_dim, 1e5)
    ops = fused_ops(x)

    def swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rope(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (angles[:, None] for angles in table)  # [s, 1, d / 2]
        halves = ((y.float().chunk(2, dim=-1), y.dtype) for y in (q, k))
        return tuple(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(dtype) for (a, b), dtype in halves)

    operators: dict[str, tuple[tuple[Tensor, ...], Callable[..., Any], Callable[..., Any]]] = {
        "RMSNorm": ((x, weight), lambda x, w: ops.rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)),
        "SwiGLU": ((gate_up,), ops.swiglu, swiglu),
        # Clones, for both: RoPE may overwrite what it is given.
        "RoPE": ((q, k), lambda q, k: ops.rope(q.clone(), k.clone(), table), lambda q, k: rope(q.clone(), k.clone())),
    }

    def passes(operator: Callable[..., Any], arguments: tuple[Tensor, ...]) -> None:
        found = operator(*arguments)
        results = found if isinstance(found, tuple) else (found,)
        torch.autograd.grad(results, arguments, [torch.ones_like(y) for y in results])

    backend = "inductor" if ready.device == "cuda" else "eager"
    for name, (arguments, as_trained, plain) in operators.items():
        for part, operator in ((name, as_trained), (f"{name}, compiled", torch.compile(plain, backend=backend))):
            yield tried_row(ready, part, lambda: partial(passes, operator, arguments))  # noqa: B023  (called at once)
