"""A machine that runs a Gluon kernel's Python source: numpy for tensors, threads for groups of warps.

Gluon has no interpreter. Barriers count arrivals, bytes and phases as mbarriers do, copies land late and in pieces of
time of their own, and buffers hold nan while they are written. Products read their operands as late as they may,
when they are waited for. So a kernel that waits for the wrong phase, reads a buffer too early or frees it too early
gives other results, or never ends, which is an error after `LIMIT_S`. Registers, layouts and machine code are not
checked.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

LIMIT_S = 20
"""Time after which a wait is taken for one without end."""
KERNELS = Path(__file__).parents[2] / "kernels"


class Array(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype: Any) -> Array:
        return self.astype(dtype).view(Array)


class Pointer:
    """Addresses of elements of a flat array."""

    def __init__(self, memory: np.ndarray, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        bits = memory.dtype.itemsize * 8
        self.dtype = SimpleNamespace(element_ty=Element(memory.dtype, bits))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)


class Element:
    """The type of an element, which numpy and Triton's own code read."""

    def __init__(self, dtype: np.dtype, bits: int) -> None:
        self.dtype, self.primitive_bitwidth = dtype, bits

    def __eq__(self, other: object) -> bool:
        return self.dtype == other


class Buffer:
    """Shared memory."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory, self.dtype = memory, memory.dtype

    def index(self, i: int) -> Buffer:
        return Buffer(self.memory[i])

    def permute(self, order: list[int]) -> Buffer:
        return Buffer(self.memory.transpose(order))

    def reshape(self, shape: list[int]) -> Buffer:
        return Buffer(self.memory.reshape(shape))

    def load(self, layout: None) -> Array:
        return self.memory.copy().view(Array)

    def store(self, values: Array) -> None:
        self.memory[:] = np.nan
        time.sleep(1e-3)
        self.memory[:] = values


class Product:
    """An accumulator to which a product is added some time before it is waited for."""

    def __init__(self, left: Any, right: Buffer, acc: Any, use_acc: bool) -> None:
        self.operands, self.result = (left, right, acc, use_acc), None

    def end(self) -> None:
        left, right, acc, use_acc = self.operands
        left = left.memory if isinstance(left, Buffer) else left
        acc = acc.result if isinstance(acc, Product) else acc
        product = np.asarray(left, np.float32) @ np.asarray(right.memory, np.float32)
        self.result = (product + acc * use_acc).view(Array)


class Barrier:
    """An mbarrier, or several."""

    def __init__(self, batch: int | None = None) -> None:
        self.parts = [Barrier() for _ in range(batch or 0)]
        self.changed, self.count, self.arrived, self.bytes, self.phase = threading.Condition(), 0, 0, 0, 0

    def index(self, i: int) -> Barrier:
        return self.parts[i]

    def init(self, count: int) -> None:
        self.count = count

    def arrive(self, count: int, num_bytes: int) -> None:
        """Count arrivals, and bytes that are awaited (above 0) or have come (below 0)."""
        with self.changed:
            self.arrived, self.bytes = self.arrived + count, self.bytes + num_bytes
            assert self.arrived <= self.count, "more arrivals than a phase has"
            if self.arrived == self.count and self.bytes == 0:
                self.arrived, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        """Wait until the phase of this parity has ended; the one before the first has."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase % 2 != parity, LIMIT_S), "a wait without end"


class Machine:
    """Runs the programs of a kernel one after the other."""

    def __init__(self, kernel: str, seed: int = 0) -> None:
        self.random, self.program, self.group = random.Random(seed), 0, threading.local()
        gl = self._language()
        jit = SimpleNamespace(jit=lambda *given, **_: given[0] if given else lambda function: function)
        # What the sources import; annotations stay strings.
        self.names: dict[str, Any] = {
            "gl": gl,
            "tl": gl,
            "triton": jit,
            "gluon": jit,
            "VARYING": [],
            "Blocks": lambda *sizes: sizes,
        }
        self.names |= {"mbarrier": self._barriers(), "tma": self._copies(), "warpgroup_mma": self._product}
        self.names |= {"warpgroup_mma_wait": self._wait}
        for name in ("triton_blocks", "gluon_blocks", kernel):
            source = (KERNELS / f"{name}.py").read_text()
            source = re.sub(r"^from (?!__future__)[\w.]+ import (\([^)]*\)|.*)$|^import .*$", "", source, flags=re.M)
            exec(compile(source, name, "exec"), self.names)

    def run(self, kernel: str, num_programs: int, *arguments: Any, **constants: Any) -> None:
        """Run all programs of a kernel."""
        for self.program in range(num_programs):
            self.names[kernel](*arguments, **constants)

    def _pause(self) -> None:
        if self.random.random() < 0.3:
            time.sleep(self.random.random() * 1e-3)

    def _language(self) -> SimpleNamespace:
        def read(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
            offset, mask = np.broadcast_arrays(pointer.offset, mask)
            found = np.full(offset.shape, other, pointer.memory.dtype)
            found[mask] = pointer.memory[offset[mask]]
            return found.view(Array) if found.ndim else found[()]

        def write(pointer: Pointer, values: Any, mask: Any) -> None:
            offset, mask, values = np.broadcast_arrays(pointer.offset, mask, values)
            pointer.memory[offset[mask]] = values[mask]

        def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any) -> Any:
                with np.errstate(all="ignore"):
                    return function(*given)

            return call

        def where(condition: Any, a: Any, b: Any) -> Any:
            found = np.where(condition, a, b)
            narrow = found.astype(np.float32) if found.dtype == np.float64 else found
            return narrow.view(Array) if narrow.ndim else narrow[()]

        def allocate(element: Any, shape: list[int], layout: None) -> Buffer:
            return Buffer(np.full(shape, np.nan, np.dtype(element)))

        layouts = ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout")
        return SimpleNamespace(
            **dict.fromkeys(layouts, lambda *_: None),
            constexpr=lambda value: value,
            float32=np.float32,
            program_id=lambda axis: self.program,
            load=read,
            store=write,
            where=where,
            minimum=np.minimum,
            maximum=np.maximum,
            cdiv=lambda a, b: -(-a // b),
            max=lambda x, axis: x.max(axis),
            sum=lambda x, axis: x.sum(axis),
            exp2=quiet(np.exp2),
            log2=quiet(np.log2),
            arange=lambda start, stop, layout: np.arange(start, stop).view(Array),
            zeros=lambda shape, dtype, layout: np.zeros(shape, dtype).view(Array),
            full=lambda shape, value, dtype, layout: np.full(shape, value, dtype).view(Array),
            convert_layout=lambda x, layout: x,
            static_range=range,
            static_assert=lambda condition: None,
            allocate_shared_memory=allocate,
            NVMMASharedLayout=SimpleNamespace(get_default_for=lambda shape, dtype: None),
            warp_specialize=self._groups,
        )

    def _barriers(self) -> SimpleNamespace:
        return SimpleNamespace(
            allocate_mbarrier=Barrier,
            init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, num_bytes: barrier.arrive(1, num_bytes),
            arrive=lambda barrier, count: barrier.arrive(count, 0),
            wait=lambda barrier, phase: barrier.wait(phase),
        )

    def _copies(self) -> SimpleNamespace:
        def describe(pointer: Pointer, shape: Any, strides: Any, block: Any, layout: None) -> SimpleNamespace:
            item = pointer.memory.itemsize
            view = np.lib.stride_tricks.as_strided(
                pointer.memory[pointer.offset :], shape, [stride * item for stride in strides]
            )
            return SimpleNamespace(view=view, block=block, nbytes_per_cta=math.prod(block) * item)

        def copy(rows: SimpleNamespace, at: list[int], barrier: Barrier, buffer: Buffer) -> None:
            buffer.memory[:] = np.nan

            def land() -> None:
                self._pause()
                found = rows.view[tuple(slice(i, i + size) for i, size in zip(at, rows.block, strict=True))]
                whole = np.zeros(rows.block, buffer.dtype)  # what lies beyond the edges is 0
                whole[tuple(map(slice, found.shape))] = found
                buffer.memory[:] = whole
                barrier.arrive(0, -rows.nbytes_per_cta)

            threading.Thread(target=land).start()

        return SimpleNamespace(make_tensor_descriptor=describe, async_copy_global_to_shared=copy)

    def _product(self, a: Any, b: Buffer, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        self.group.running.append(Product(a, b, acc, use_acc))
        return self.group.running[-1]

    def _wait(self, pending: int, deps: list[Product]) -> Any:
        """Return the results of `deps`, of which none is among the `pending` last products of this group."""
        while len(self.group.running) > pending:
            self._pause()
            self.group.running.pop(0).end()
        assert all(one.result is not None for one in deps), "a product is read before its end"
        return deps[0].result if len(deps) == 1 else tuple(one.result for one in deps)

    def _groups(self, groups: list[tuple[Callable[..., None], tuple]], warps: list[int], registers: list[int]) -> None:
        errors: list[BaseException] = []

        def run(function: Callable[..., None], arguments: tuple) -> None:
            self.group.running = []
            try:
                function(*arguments)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=group) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
