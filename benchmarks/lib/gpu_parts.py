"""Section of the parts of a training step on one rank: product, loss head, documents, a layer, its operators."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from longring.kernels.attention import attention
from longring.kernels.compilations import Compilations
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask
from longring.model.fused import fused_ops
from longring.model.rope import rope_table
from torch import Tensor

from .gpu_step import KEEP, Ready, attempt, bucket_row, compiled_row, make_ready, sizes_here, timed_ms
from .gpu_step_cases import Case
from .mfu import mfu
from .script import Row, Size
from .timing import synchronize


def part_rows(size: Size) -> Iterator[Row]:
    """Yield the parts of a micro-batch of the least tokens, the product of matrices first, which all are beside."""
    sizes = sizes_here(size)
    ready = make_ready(sizes, [sizes.tokens])
    yield compiled_row(ready)
    yield product_row(ready)
    whole = bucket_row(ready, Case(sizes.tokens, KEEP))
    yield {"part": "micro-batch", "ms": whole.get("ms"), "host_ms": whole.get("host_ms")}
    yield {"part": "documents", **documents_row(ready)}
    for part, kept_logit_bytes in (("loss head, no logits kept", 0), ("loss head", 10**11)):
        row = attempt(partial(head_row, ready, kept_logit_bytes))
        if row is None:
            yield {"part": part, "right": False, "note": f"{part}: does not fit"}
            continue
        share = f"{row['ms'] / whole['ms']:.0%} of the micro-batch" if "ms" in whole else ""
        yield {"part": part, **row, "note": f"{part}: {share}"}
    yield from layer_rows(ready)
    yield from operator_rows(ready)


def product_row(ready: Ready) -> Row:
    """Return the rate of one large matrix product, the yardstick of every other rate here."""
    n = 8192 if ready.device == "cuda" else 256
    a, b = torch.randn(2, n, n, device=ready.mesh.device).to(torch.bfloat16)
    ms, _ = timed_ms(ready.device, lambda: a @ b)
    return {"part": f"product of {n} x {n}", "ms": ms, "TFLOPs": 2 * n**3 / ms / 1e9} | mfu(2 * n**3 / ms * 1e3)


def head_row(ready: Ready, kept_logit_bytes: int) -> Row:
    """Return the row of the loss head alone, forward and backward of one micro-batch."""
    ready.model.head.kept_logit_bytes = kept_logit_bytes
    sizes = ready.sizes
    x = torch.randn(sizes.tokens, 1, sizes.hidden, device=ready.mesh.device).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(sizes.vocabulary, (1, sizes.tokens), device=ready.mesh.device)
    weight = ready.model.head.weight

    def both() -> None:
        torch.autograd.grad(ready.model.head(x, targets).sum(), (x, weight))

    ms, host_ms = timed_ms(ready.device, both)
    flops = 6.0 * sizes.tokens * sizes.hidden * len(weight)
    return {"ms": ms, "host_ms": host_ms, "TFLOPs": flops / ms / 1e9} | mfu(flops / ms * 1e3)


def documents_row(ready: Ready) -> Row:
    """Return the row of random packings of documents, and the number of kernels that they compiled."""
    length, draw = ready.sizes.tokens, random.Random(0)
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
        ms, host_ms = timed_ms(ready.device, make())
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
