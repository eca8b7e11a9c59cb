"""Cases of attention that benchmarks share: their inputs, and how members are timed beside each other."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from typing import Any, NamedTuple

import torch
from longring.kernels import layout
from longring.kernels import mask as masks
from torch import Tensor

Row = dict[str, Any]
Phase = Callable[[Any], Any]
"""One timed part of a member; takes what the part before it returned."""

CASE_S = 1.0
"""Time given to the repeats of one case, where a few do not take longer."""
LEAST_ROUNDS = {"cpu": 7, "cuda": 2}
L2_BYTES = 256 * 2**20
"""Written before each timed call, so that none finds its inputs in the cache: more than any device's L2."""


class Case(NamedTuple):
    """Inputs all members get: q `[batch, tokens, heads, head_dim]`."""

    mask: str
    tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    flex: bool = False
    """Whether FlexAttention is timed: it is compiled anew for each case, which takes longer than all the rest."""


def about(device: str) -> Row:
    """What a figure is worth nothing without."""
    found = {"date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__}
    if device == "cuda":
        import triton  # only CUDA members need it

        found |= {
            "device": torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        found["device"] = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return found | {"python": platform.python_version()}


def document_tokens(tokens: int) -> tuple[int, ...]:
    """Lengths of packed documents, log-uniform from tokens / 128 to tokens / 4: the same at every call."""
    generator = torch.Generator().manual_seed(tokens)
    found, left = [], tokens
    while left:
        drawn = int(tokens / 128 * 32 ** torch.rand((), generator=generator).item())
        found.append(min(left, max(1, drawn)))
        left -= found[-1]
    return tuple(found)


def layout_of(case: Case) -> Any:
    packed = document_tokens(case.tokens) if case.mask == "documents" else (case.tokens,)
    return layout.SeqLayout.packed(packed)


def mask_of(case: Case, device: str) -> Any:
    whole = layout_of(case)
    return masks.make_mask(whole, whole, causal=case.mask != "full", device=device)


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v that ask for gradients, and dout."""
    generator = torch.Generator(device).manual_seed(0)
    shape = {"generator": generator, "device": device, "dtype": getattr(torch, case.dtype)}
    q, k, v, dout = (
        torch.randn((case.batch, case.tokens, heads, case.head_dim), **shape)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    return *(x.requires_grad_() for x in (q, k, v)), dout


def cuda_cases(quick: bool) -> list[Case]:
    """The bars' cases first, the longest last: what a deadline cuts off matters least."""

    def case(mask: str, tokens: int, head_dim: int, grouped: bool, flex: bool = False) -> Case:
        heads = 2048 // head_dim
        return Case(
            mask, tokens, max(1, 16384 // tokens), heads, heads // 8 if grouped else heads, head_dim, "bfloat16", flex
        )

    found = [case("causal", 16384, 128, False, True), case("documents", 16384, 128, False, True)]
    if quick:
        return found
    found += [case("causal", 16384, d, grouped, True) for d, grouped in ((128, True), (64, False), (64, True))]
    found += [case("documents", 16384, d, grouped, True) for d, grouped in ((128, True), (64, False))]
    found += [case("full", 16384, d, grouped, d == 128 and not grouped) for d in (128, 64) for grouped in (False, True)]
    for tokens in (2048, 8192, 32768):
        found += [
            case(mask, tokens, d, grouped)
            for mask in ("causal", "full")
            for d in (128, 64)
            for grouped in (False, True)
        ]
    found += [case("documents", 65536, 128, grouped, not grouped) for grouped in (False, True)]
    for mask in ("documents", "causal", "full"):
        found += [case(mask, 131072, d, grouped) for d in (128, 64) for grouped in (False, True)]
    return found


def cpu_cases(quick: bool) -> list[Case]:
    return [
        Case(mask, tokens, 1, 8, kv_heads, 64, dtype)
        for tokens in ((2048,) if quick else (1024, 2048, 4096))
        for mask in (("causal", "documents") if quick else ("causal", "full", "documents"))
        for dtype in ("float32", "bfloat16")
        for kv_heads in (8, 1)
    ]


def plan(quick: bool) -> tuple[list[Case], str, str]:
    """Cases, device and backend of this machine."""
    if torch.cuda.is_available():
        return cuda_cases(quick), "cuda", "triton"
    return cpu_cases(quick), "cpu", "torch_cpu"


def warm_up(phases: list[Phase], device: str) -> int | None:
    """Compile and run twice; peak memory of the second time beyond what was there, on CUDA."""
    for number in range(2):
        synchronize(device)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda" and number:
            torch.cuda.reset_peak_memory_stats()
        value = None
        for phase in phases:
            value = phase(value)
        synchronize(device)
        del value
    return torch.cuda.max_memory_allocated() - before if device == "cuda" else None


def interleaved_ms(members: dict[str, list[Phase]], device: str, budget_s: float = CASE_S) -> dict[str, list[float]]:
    """Median time of each phase of each member, and last of their sum; members take turns. They are warm already."""
    flushed = torch.empty(L2_BYTES if device == "cuda" else 0, dtype=torch.int8, device=device)

    def round_of_all() -> dict[str, list[tuple[Any, Any]]]:
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in members}
        for name, phases in members.items():
            value = None
            for phase in phases:
                flushed.zero_()
                start = moment(device)
                value = phase(value)
                marks[name].append((start, moment(device)))
        return marks

    started = time.perf_counter()
    rounds = [round_of_all()]
    synchronize(device)
    affordable = int(budget_s / (time.perf_counter() - started))
    rounds += [round_of_all() for _ in range(min(30, max(LEAST_ROUNDS[device] - 1, affordable)))]
    synchronize(device)
    found = {}
    for name in members:
        times = [[elapsed_ms(*pair) for pair in marks[name]] for marks in rounds]
        found[name] = [median(phase) for phase in zip(*([*t, sum(t)] for t in times), strict=True)]
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def moment(device: str) -> Any:
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(start: Any, stop: Any) -> float:
    return (stop - start) * 1e3 if isinstance(start, float) else start.elapsed_time(stop)
