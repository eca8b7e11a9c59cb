"""Which backend is fastest for each kind of tile, by measurement on this device.

A backend counts for a kind of tile only if its results there are those of `reference`. An error of a kernel may end the
process, so `launch/attention_backends.py` measures each backend in a process of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .attention import attention_backward, attention_forward, gradients_of, no_result, row_delta, zeros_fp32
from .backends import BACKENDS, Selection
from .case import Kind, Task
from .layout import SeqLayout
from .mask import Mask, make_mask
from .varlen import kind_of

CHECKED_TOKENS = 999
"""Tokens of a checked tile: several blocks of every kernel, and no multiple of one."""
FACTOR = {torch.bfloat16: 3, torch.float16: 3, torch.float32: 64}
"""Largest error, as a multiple of that of rounding the exact result to the dtype. 16 bit: probabilities and their
gradients are rounded once more before the second product. fp32: sums over many keys, by `reference` as well."""
ROUNDING = 0.2
"""Root mean square of the error of rounding numbers of all sizes to a dtype, over their own and over its epsilon: that
of an even distribution, 1 / (2 x 3^0.5), times 0.72, the mean inverse of a mantissa."""
TIMED_S = 0.05
"""Seconds for which a tile is computed again and again."""


class Sample(NamedTuple):
    """A tile of a run, and the tasks that the run computes on it."""

    batch: int
    queries: SeqLayout
    keys: SeqLayout
    window: int | None
    tasks: tuple[Task, ...]

    def mask(self, device: torch.device) -> Mask:
        """Return the mask of the tile on a device."""
        return make_mask(self.queries, self.keys, window=self.window, device=device)


class Question(NamedTuple):
    """The attention of one run: on one rank, before heads are divided by context parallelism."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    samples: tuple[Sample, ...]


class Timing(NamedTuple):
    """Measurement of a backend for one task on one sample."""

    task: Task
    kind: Kind
    sample: int
    """Index of the sample in its question."""
    backend: str
    seconds: float | None
    """Median of the calls; None: the backend failed or was wrong, and `note` says how."""
    note: str


def tiles_of(question: Question, device: torch.device) -> dict[tuple[Task, Kind], list[int]]:
    """Return the indices of the samples by task and kind of tile."""
    found: dict[tuple[Task, Kind], list[int]] = {}
    for number, sample in enumerate(question.samples):
        for task in sample.tasks:
            found.setdefault((task, kind_of(sample.mask(device))), []).append(number)
    return found


def measure(question: Question, backend: str, device: torch.device) -> Iterator[Timing]:
    """Yield the timings of a backend on the samples of a question, by task and kind of tile.

    A backend that raises an error, or whose results are wrong, gets a note instead of a time. An error of CUDA itself
    is raised, since nothing can be computed after it.
    """
    for (task, kind), numbers in tiles_of(question, device).items():
        if kind not in BACKENDS[backend].kinds:
            continue
        note, is_checked = "", False
        batch = min(2, max(question.samples[number].batch for number in numbers))
        for number in numbers:
            seconds = None
            try:
                if not is_checked:
                    note, is_checked = _wrong(question, backend, task, kind, batch, device), True
                seconds = None if note else _seconds(question, backend, task, question.samples[number], device)
            except torch.AcceleratorError:
                raise
            except Exception as error:  # a package may fail in any way
                note = f"{type(error).__name__}: {error!s:.300}"
            yield Timing(task, kind, number, backend, seconds, note)


def fastest(timings: Iterable[Timing]) -> dict[tuple[Task, Kind], str]:
    """Return the fastest backend for each task and kind of tile that has one; of equal ones the first.

    The seconds of all samples of the kind are summed; a backend that fails for one of them does not count.
    """
    sums: dict[tuple[Task, Kind], dict[str, float]] = {}
    for timing in timings:
        of_tile = sums.setdefault((timing.task, timing.kind), {})
        seconds = math.inf if timing.seconds is None else timing.seconds
        of_tile[timing.backend] = of_tile.get(timing.backend, 0.0) + seconds
    found = {tile: min(of_tile, key=lambda name: of_tile[name]) for tile, of_tile in sums.items()}
    return {tile: name for tile, name in found.items() if sums[tile][name] < math.inf}


def select(default: str, timings: Iterable[Timing]) -> Selection:
    """Return the fastest backend for each task and kind of tile, and `default` for tiles that have none.

    Raises ValueError for a tile that has none, if `default` itself was measured there and failed.
    """
    rows = list(timings)
    chosen = fastest(rows)
    said: dict[tuple[Task, Kind], dict[str, str]] = {}
    for row in rows:
        if (row.task, row.kind) not in chosen and row.note:
            said.setdefault((row.task, row.kind), {}).setdefault(row.backend, row.note)
    for (task, kind), notes in said.items():
        if default in notes:
            found = "; ".join(f"{name}: {note}" for name, note in notes.items())
            raise ValueError(
                f"attention backend = 'auto': no backend passed its check in the {task} of {kind} tiles ({found}); "
                'name one (in a recipe train.attention_backend), which no start checks: "reference" computes every '
                "tile, but holds all scores"
            )
    return Selection(default, chosen)


def rehearse(question: Question, backend: str, device: torch.device) -> None:
    """Compute each task of every sample once, which compiles kernels; `backend` is a name or a `Selection` as text."""
    for (task, _), numbers in tiles_of(question, device).items():
        for number in numbers:
            _call(question, backend, task, question.samples[number], device)()


def _inputs(question: Question, sample: Sample, device: torch.device) -> list[Tensor]:
    """Return q, k, v, dout: q, dout `[b, s_q, h_q, d]`, k, v `[b, s_k, h_kv, d]`, random but equal in every call."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(sample.queries, question.num_heads), *[(sample.keys, question.num_kv_heads)] * 2]
    return [
        torch.randn(
            (sample.batch, side.num_tokens, heads, question.head_dim),
            generator=generator, device=device, dtype=question.dtype,
        )
        for side, heads in (*sizes, sizes[0])
    ]  # fmt: skip


def _call(question: Question, backend: str, task: Task, sample: Sample, device: torch.device) -> Callable[[], object]:
    """Return the call of one task on a sample."""
    (q, k, v, dout), mask = _inputs(question, sample, device), sample.mask(device)
    if task == "forward":
        return lambda: attention_forward(q, k, v, mask, backend=backend)
    if task == "continued":
        running = no_result(q)
        return lambda: attention_forward(q, k, v, mask, running=running, backend=backend)
    lse = torch.zeros(sample.batch, question.num_heads, sample.queries.num_tokens, device=device)
    # Tiles of context parallelism get delta and add to sums, a whole sequence has its own result; any numbers serve.
    if "continued" in sample.tasks:
        rest = {"delta": lse, "out": None, "into": (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))}
    else:
        rest = {"delta": None, "out": q, "into": gradients_of(q, k, v)}
    return lambda: attention_backward(dout, q, k, v, lse, mask=mask, backend=backend, **rest)


def _seconds(question: Question, backend: str, task: Task, sample: Sample, device: torch.device) -> float:
    """Return the median of the seconds that a task takes on a sample."""
    call, times = _call(question, backend, task, sample, device), []
    for _ in range(2):  # the first compiles, the second fills caches
        call()
    _finish(device)
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < TIMED_S:
        before = time.perf_counter()
        call()
        _finish(device)
        times.append(time.perf_counter() - before)
    return median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _checked(kind: Kind, task: Task, batch: int) -> list[Sample]:
    """Return tiles of a kind on which results are checked."""
    s = CHECKED_TOKENS
    whole, tasks = SeqLayout.contiguous(s), cast("tuple[Task, ...]", (task,))
    if kind == "whole":
        return [Sample(batch, SeqLayout(((s, 2 * s),)), whole, None, tasks)]
    if kind == "causal":
        return [Sample(batch, whole, whole, None, tasks)]
    if kind == "window":
        return [Sample(batch, whole, whole, s // 7, tasks)]
    packed = SeqLayout.packed((s // 3, 1, s // 5, s - s // 3 - s // 5 - 1))
    # Two chunks of one rank against two of another, in three documents and a window; some queries see no key.
    starts = (0, s // 2, s)
    queries, keys = SeqLayout(((s // 4, s // 2), (s, s + s // 4)), starts), SeqLayout(((0, s // 3), (s - 9, s)), starts)
    return [Sample(batch, packed, packed, None, tasks), Sample(batch, queries, keys, s // 7, tasks)]


def _wrong(question: Question, backend: str, task: Task, kind: Kind, batch: int, device: torch.device) -> str:
    """Return how a backend differs from `reference` in a task on a kind of tile, in words; "" if it does not."""
    for sample in _checked(kind, task, batch):
        mask = sample.mask(device)
        assert kind_of(mask) == kind, f"a checked tile of kind {kind!r} is of kind {kind_of(mask)!r}"
        q, k, v, dout = _inputs(question, sample, device)
        got, exact = [function(q, k, v, dout, mask, task) for function in (_results(backend), _results("reference"))]
        for name, result in got.items():
            if reason := _differs(name, result, exact[name], question.dtype):
                return reason
    return ""


def _results(backend: str) -> Callable[..., dict[str, Tensor]]:
    """Return the function that computes a task with a backend; results of `reference` are not rounded to the dtype."""

    def compute(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Mask, task: Task) -> dict[str, Tensor]:
        # The running result over other keys may be any numbers; this lse gives it weights from near 0 to near 1.
        lse = torch.linspace(-1, 8, q.shape[1], device=q.device).expand(q.shape[0], q.shape[2], -1).clone()
        others = (q.float().flip(1).contiguous(), lse)
        if task != "backward":
            nothing = no_result(q) if backend == "reference" else None  # a running result makes out fp32
            running = others if task == "continued" else nothing
            found = attention_forward(q, k, v, mask, running=running, backend=backend)
            return dict(zip(("out", "lse"), found, strict=True))
        out, lse = attention_forward(q, k, v, mask, running=others, backend="reference")
        into = (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))
        delta = row_delta(dout, out.to(q.dtype))
        attention_backward(dout, q, k, v, lse, delta, mask, into=into, backend=backend)
        return dict(zip(("dq", "dk", "dv"), into, strict=True))

    return compute


def _differs(name: str, got: Tensor, exact: Tensor, dtype: torch.dtype) -> str:
    """Return how a result differs from the exact one, in words; "" if by rounding alone."""
    if name == "lse":
        if not torch.equal(got.isneginf(), exact.isneginf()):
            return "lse is not -inf for the queries that see no key"
        # A kernel may round each probability to the dtype before it sums them; scores and lse itself are rounded too.
        allowed = max(torch.finfo(dtype).eps / 2, 1e-5) + 1e-5 * exact.abs()
        worst, limit = float(((got - exact).abs() / allowed)[~exact.isneginf()].max()), 1.0
    else:
        rounding = ROUNDING * torch.finfo(dtype).eps * exact.square().mean().sqrt()
        worst = float((got.float() - exact).square().mean().sqrt() / rounding)
        limit = FACTOR[dtype]
    return "" if worst <= limit else f"{name} differs from that of reference: {worst:.3g}, more than {limit:.3g}"
