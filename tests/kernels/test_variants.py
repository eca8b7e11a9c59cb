"""No kernel is compiled after those that a run launches before its first step: Triton's own keys are counted.

No device is needed: Triton asks `jit_cache_hook` for each new variant, and the hook here says that there is nothing to
compile. The kernels are a second copy of their modules, since the tests' own are interpreted.
"""

from __future__ import annotations

import importlib
import random
import sys
import types
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.experimental.gluon  # noqa: F401  (its first import, at a launch, would find interpreted functions)
from longring import kernels as longring_kernels
from longring.kernels import attention, triton_attention
from longring.kernels.attention import no_result, zeros_fp32
from longring.kernels.blocks import Blocks
from longring.kernels.compilations import Compilations
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.visible import Visibility
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

RANKS, TOKENS = 4, 64
"""Ranks of a sequence, and tokens of each."""


@pytest.fixture
def kernels(monkeypatch) -> types.ModuleType:
    """A copy of the launch functions whose kernels are not interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    package = types.ModuleType("compiled_kernels")
    package.__path__ = [str(Path(__file__).parents[2] / "kernels")]
    monkeypatch.setitem(sys.modules, "compiled_kernels", package)
    kernels = importlib.import_module("compiled_kernels.triton_attention")
    kernels._COMPILED.clear()
    return kernels


@pytest.fixture
def no_device(monkeypatch) -> None:
    """A driver without a device."""
    stub = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 7,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", stub)


@pytest.fixture
def asked(kernels, no_device, monkeypatch) -> Counter[tuple[str, str]]:
    """The count of each variant that launches ask for."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the backend may run here
    monkeypatch.setattr(longring_kernels, "triton_attention", kernels, raising=False)
    monkeypatch.setattr(attention, "merge_", kernels.merge_)  # these two would choose torch's on the CPU
    monkeypatch.setattr(attention, "row_delta", kernels.row_delta)
    asked: Counter[tuple[str, str]] = Counter()

    def ask(*, fn, key, **_) -> bool:
        asked[fn.name, key] += 1
        return True  # there is nothing to compile

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", ask)
    return asked


def packing(rng: random.Random) -> tuple[tuple[int, ...], Visibility]:
    """Return the document starts of a random packing of all tokens, and an attention window or none."""
    starts = {0, *(rng.randrange(1, RANKS * TOKENS) for _ in range(rng.randrange(12)))}
    return tuple(sorted(starts)), Visibility(window=rng.choice([None, rng.randrange(1, 2 * TOKENS)]))


def launch_packing(kernels: types.ModuleType, starts: tuple[int, ...], visibility: Visibility) -> None:
    """Launch the kernels of one rank of a ring for a packing, then those of a whole sequence on one rank."""
    layouts = [SeqLayout(zigzag(RANKS * TOKENS, rank, RANKS).runs, starts) for rank in range(RANKS)]
    schedule = Schedule(CpGrid.token_ring(RANKS), layouts, visibility, "forward")
    # k and v are views of one projection, as in the model: their strides are not those of a tensor of their own.
    q, dout = torch.zeros(2, 1, TOKENS, 4, 16, dtype=torch.bfloat16)
    k, v = torch.zeros(1, TOKENS, 2, 6, 16, dtype=torch.bfloat16).split([3, 3], dim=3)
    k, v = k[:, :, :, 0], v[:, :, :, 0]
    out, lse = no_result(q)
    into = tuple(zeros_fp32(x) for x in (q, k, v))
    delta = kernels.row_delta(dout, q)
    for tile in (step.tile for step in schedule.plan(1).steps):
        if tile is None:
            continue
        sides = layouts[tile.query_owner].part(tile.query_rows), layouts[tile.key_owner].part(tile.key_rows)
        queries, keys = (slice(rows[0][0], rows[0][0] + side.num_tokens)
                         for rows, side in zip((tile.query_rows, tile.key_rows), sides, strict=True))  # fmt: skip
        mask = make_mask(*sides, window=visibility.window)
        part = (out[:, queries], lse[:, :, queries])
        kernels.forward(q[:, queries], k[:, keys], v[:, keys], mask, 0.25, 0.0, part)
        sums = (into[0][:, queries], into[1][:, keys], into[2][:, keys])
        stats = (lse[:, :, queries], delta[:, :, queries])
        kernels.backward(dout[:, queries], q[:, queries], k[:, keys], v[:, keys], None, *stats, mask, 0.25, 0.0, sums)
        kernels.merge_(*part, part[0].bfloat16()[None], part[1][None])
    # A rank that holds whole sequences: any number of tokens, no running result.
    num_tokens = 1 + starts[-1]
    whole = SeqLayout(((0, num_tokens),), starts)
    q, k, v, dout = (torch.zeros(1, num_tokens, 4, 16, dtype=torch.bfloat16) for _ in range(4))
    mask = make_mask(whole, whole, window=visibility.window)
    out, lse = kernels.forward(q, k, v, mask, 0.25, 0.0, None)
    kernels.backward(dout, q, k, v, out, lse, None, mask, 0.25, 0.0, attention.gradients_of(q, k, v))


@pytest.mark.full
def test_200_packings_need_no_kernel_beyond_those_launched_before(kernels, asked):
    attention.launch_all(2, 2, 16, torch.bfloat16, torch.device("cpu"), "triton")
    before = set(asked)
    assert {name for name, _ in before} == {
        f"{name}_kernel" for name in ("forward", "backward_dkdv", "backward_dq", "delta", "merge")
    }
    rng = random.Random(0)
    for _ in range(200):
        launch_packing(kernels, *packing(rng))
    assert not Counter(name for name, _ in set(asked) - before)


def test_no_kernel_is_compiled_for_a_whole_number_in_the_dress_of_a_float(kernels, asked):
    q = torch.zeros(1, 16, 2, 16, dtype=torch.bfloat16)
    layout = SeqLayout.contiguous(16)
    mask = make_mask(layout, layout)
    for scale, softcap in ((0.25, 2.5), (1.0, 1.0), (1, 1), (2, 30)):
        out, lse = kernels.forward(q, q, q, mask, scale, softcap, None)
        kernels.backward(q, q, q, q, out, lse, None, mask, scale, softcap, tuple(zeros_fp32(q) for _ in range(3)))
    names = ("forward_kernel", "backward_dkdv_kernel", "backward_dq_kernel", "delta_kernel")
    assert Counter(name for name, _ in asked) == dict.fromkeys(names, 1)


def test_the_gluon_kernels_are_compiled_once(kernels, asked):
    for num_tokens, heads, scale in ((16, 2, 0.25), (1, 1, 1), (50, 3, 2)):
        q = torch.zeros(1, num_tokens, heads, 64, dtype=torch.bfloat16)
        layout = SeqLayout.contiguous(num_tokens)
        mask = make_mask(layout, layout)
        _, lse = kernels.forward_by_gluon(q, q, q, mask, scale, 0.0, None)
        kernels.backward_by_gluon(q, q, q, q, None, lse, lse, mask, scale, 0.0, tuple(zeros_fp32(q) for _ in range(3)))
    names = ("forward_kernel", "backward_dkdv_kernel", "backward_dq_kernel")
    assert Counter(name for name, _ in asked) == dict.fromkeys(names, 1)


def test_the_kernels_of_the_loss_head_are_compiled_once(kernels, asked, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    loss = importlib.import_module("compiled_kernels.triton_loss")
    for num_tokens, width, num_rows in ((16, 4096, 4000), (1, 8, 1), (33, 50_304, 50_257)):
        targets = torch.zeros(num_tokens, dtype=torch.int64)
        logits = torch.zeros(num_tokens, width, dtype=torch.bfloat16)
        stats = loss.softmax_sums(logits, targets, num_rows)
        loss.gradient_(logits, targets[-1:], num_rows, *(x[-1:] for x in stats))
    assert Counter(name for name, _ in asked) == {"sums_kernel": 1, "gradient_kernel": 1}


class Loaded(CompiledKernel):
    """A kernel as Triton returns it, which notes what the driver would get."""

    def __init__(self, passed: list[tuple[Any, ...]]) -> None:
        def run(x: int, y: int, z: int, stream: int, *arguments: Any) -> None:
            # The first five: what was loaded, and hooks.
            of_kernel = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments[5:])
            passed.append((x, y, z, stream, *of_kernel))

        self.module = self.function = self.packed_metadata = self  # type: ignore[assignment]
        self.name, self.src, self._run = "loaded", None, run


def test_a_kernel_that_is_known_gets_what_triton_would_pass(kernels, no_device, monkeypatch):
    passed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *_: Loaded(passed))
    monkeypatch.setattr(kernels, "blocks", lambda kernel, q: Blocks(32, 32, 4, 2))
    q, k, out = torch.zeros(1, 48, 4, 32).bfloat16(), torch.zeros(1, 48, 2, 32).bfloat16(), torch.zeros(1, 48, 4, 32)
    lse, delta, sums = torch.zeros(1, 4, 48), torch.zeros(1, 4, 48), tuple(zeros_fp32(x) for x in (q, k, k))
    monkeypatch.setattr(torch, "empty", lambda shape, **_: delta[:, :, : shape[2]])  # of row_delta

    def launch_all(num_tokens: int) -> list[tuple[Any, ...]]:
        rows, layout = slice(48 - num_tokens, None), SeqLayout.contiguous(num_tokens)
        mask = make_mask(layout, layout)
        passed.clear()
        some, stats = (q[:, rows], k[:, rows], k[:, rows]), (lse[:, :, rows], delta[:, :, rows])
        kernels.forward(*some, mask, 0.25, 0.0, (out[:, rows], stats[0]))
        kernels.backward(some[0], *some, None, *stats, mask, 0.25, 0.0, tuple(x[:, rows] for x in sums))
        kernels.merge_(out[:, rows], stats[0], some[0][None], stats[0][None])
        kernels.row_delta(some[0], some[0])
        return list(passed)

    launch_all(48)
    known = dict(kernels._COMPILED)
    assert len(known) == 5
    fast = launch_all(32)
    assert known == kernels._COMPILED, "Triton did not search again"
    kernels._COMPILED.clear()
    assert fast == launch_all(32)


class Known:
    """A kernel, and what Triton returns for it; counts its launches by both ways."""

    def __init__(self) -> None:
        self.launches: list[str] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*_: Any, **options: Any) -> Known:
            self.launches.append("known" if len(grid) == 3 else "searched")
            return self

        return launch


@pytest.mark.parametrize(("hip", "then"), [(None, "known"), ("6.2", "searched")])
def test_on_amd_triton_looks_at_every_tensor(monkeypatch, hip, then):
    """Its compiler takes the offsets of a tensor below 2 GiB for 32-bit numbers."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton_attention, "_COMPILED", {})
    kernel = Known()
    for _ in range(2):
        triton_attention._launch(kernel, 3, (torch.zeros(4),), (1,), (2,))
    assert kernel.launches == ["searched", then]


def test_compilations_are_counted_and_other_hooks_still_called(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **compiled: told.append(compiled["repr"]))
    with Compilations() as compilations:
        hook: Any = knobs.runtime.jit_post_compile_hook
        for name in ("one", "two"):
            hook(repr=name)
        assert (compilations.count, told) == (2, ["one", "two"])
    hook = knobs.runtime.jit_post_compile_hook
    hook(repr="three")
    assert (compilations.count, told[2:]) == (2, ["three"])
