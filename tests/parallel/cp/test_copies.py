"""Copies between ranks of one machine: the order of signals in any interleaving, and real processes."""

from __future__ import annotations

import os
import random
from collections.abc import Generator
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.lanes import by_lane
from helpers.layouts import scattered
from helpers.simulated_peers import Machine
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.parallel.cp import device_memory, reach
from longring.parallel.cp.copies import Copies, Queue, contents
from longring.parallel.cp.execute import AttentionSpec, backward, forward
from longring.parallel.cp.grid import CpGrid, grids
from longring.parallel.cp.group import CommunicatorOptions, all_links, open_rings, slot_layout
from longring.parallel.cp.host_memory import HostMemory, HostQueue
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.plan import PASSES, Link, Message
from longring.parallel.cp.reach import open_copies
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.transports import InProcess
from longring.parallel.cp.visible import Visibility
from longring.parallel.failures import LostRank
from torch import Tensor

Tensors = list[Tensor]


def inputs(spec: AttentionSpec, num_heads: int, dtype: torch.dtype) -> list[Tensors]:
    """Return q, k, v and dout of each rank."""
    generator = torch.Generator().manual_seed(num_heads)
    num_tokens = sum(layout.num_tokens for layout in spec.layouts)
    whole = torch.randn(4, 1, num_tokens, num_heads, 8, generator=generator).to(dtype)
    return [list(whole[:, :, layout.positions()]) for layout in spec.layouts]


def in_process(spec: AttentionSpec, of_ranks: list[Tensors]) -> list[Tensors]:
    wires = InProcess()
    outs = wires.drive([forward(spec, r, q, k, v, wires) for r, (q, k, v, _) in enumerate(of_ranks)])
    wires = InProcess()
    backs = [backward(spec, r, dout, outs[r][1], dout.shape[2], wires) for r, (_, _, _, dout) in enumerate(of_ranks)]
    return [[out, *grads] for (out, _), grads in zip(outs, wires.drive(backs), strict=True)]


def by_copies(machine: Machine, spec: AttentionSpec, of_ranks: list[Tensors], seed: int) -> list[Tensors]:
    choose = random.Random(seed).randrange
    wires = machine.transports()
    passes: list[Any] = [forward(spec, r, q, k, v, wires[r]) for r, (q, k, v, _) in enumerate(of_ranks)]
    outs = machine.drive(passes, wires, choose)
    wires = machine.transports()
    passes = [
        backward(spec, r, dout, outs[r][1], dout.shape[2], wires[r]) for r, (_, _, _, dout) in enumerate(of_ranks)
    ]
    return [[out, *grads] for (out, _), grads in zip(outs, machine.drive(passes, wires, choose), strict=True)]


def assert_equal(got: list[Tensors], wanted: list[Tensors]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


def spec_of(
    grid: CpGrid, num_tokens: int, starts: tuple[int, ...] = (0,), window: int | None = None, cut=zigzag
) -> AttentionSpec:
    layouts = tuple(SeqLayout(cut(num_tokens, rank, grid.size).runs, starts) for rank in range(grid.size))
    return AttentionSpec(grid, layouts, Visibility(window=window))


@st.composite
def cases(draw, most: int) -> tuple[AttentionSpec, int, int, torch.dtype]:
    """Attention over up to `most` ranks with documents and windows, its heads, bytes of a slot, and a dtype."""
    size = draw(st.integers(2, most))
    grid = draw(st.sampled_from(list(grids(size))))
    num_tokens = draw(st.integers(2 * size, 6 * size))
    lengths = draw(st.lists(st.integers(1, num_tokens), max_size=3))
    starts = tuple(start for start in accumulate(lengths, initial=0) if start < num_tokens)
    window = draw(st.none() | st.integers(1, num_tokens))
    spec = spec_of(grid, num_tokens, starts, window, draw(st.sampled_from([zigzag, scattered])))
    return spec, grid.heads, draw(st.integers(40, 2000)), draw(st.sampled_from([torch.float32, torch.bfloat16]))


@pytest.mark.parametrize(("examples", "most"), by_lane([(5, 4), (60, 8)], quick=[(5, 4)], slow=[(60, 8)]))
@pytest.mark.parametrize("one_queue", [False, True])
def test_any_interleaving_gives_the_same_bits_and_none_hangs(examples, most, one_queue):
    """Messages of many slots and of a part of one; with one queue, a device runs all queues of a rank as one."""

    @settings(max_examples=examples)
    @given(case=cases(most), seed=st.integers(0, 2**32))
    def check(case, seed):
        spec, heads, slot_bytes, dtype = case
        size = spec.grid.size
        machine = Machine(
            slot_layout([spec.grid], range(size), CommunicatorOptions(slot_bytes=slot_bytes)), size, one_queue=one_queue
        )
        of_ranks = inputs(spec, heads, dtype)
        wanted = in_process(spec, of_ranks)
        for turn in range(2):  # the second pass meets slots and signals as the first has left them
            assert_equal(by_copies(machine, spec, of_ranks, seed + turn), wanted)

    check()


def test_both_ends_post_messages_in_one_order():
    """Each rank sends more than all slots hold: if both sent first on their only queue, they would wait for ever."""
    there, back = (Message("keys", rank, ((0, 1),), rank, 1 - rank, 0, 0) for rank in (0, 1))
    machine = Machine(slot_layout([CpGrid(kv=2)], range(2), CommunicatorOptions(slot_bytes=8)), 2, one_queue=True)
    wires = machine.transports()

    def exchange(rank: int, sent: Message, received: Message) -> Generator[Message, None, Tensor]:
        own, other = torch.full((8,), float(rank)), torch.empty(8)
        wires[rank].post({sent: [own]}, {received: [other]})
        yield sent
        yield received
        return other

    got = machine.drive([exchange(0, there, back), exchange(1, back, there)], wires, lambda _: 0)
    assert [x.tolist() for x in got] == [[1.0] * 8, [0.0] * 8]


class Reordered:
    """Queue that signals before it copies, or that does not wait."""

    def __init__(self, queue: Queue, fault: str) -> None:
        self.queue, self.fault, self.held = queue, fault, []
        self.follow, self.mark = queue.follow, queue.mark

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.held.append((target, source))
        if self.fault != "signals first":
            self._copy()

    def signal(self, rank: int, number: int) -> None:
        self.queue.signal(rank, number)
        self._copy()

    def wait(self, rank: int, number: int) -> None:
        if not (self.fault == "fills a full slot" and number % 2) and self.fault != "never waits":
            self.queue.wait(rank, number)

    def _copy(self) -> None:
        for target, source in self.held:
            self.queue.copy(target, source)
        self.held = []


@pytest.mark.parametrize("fault", ["signals first", "fills a full slot", "never waits"])
def test_a_wrong_order_of_signals_is_seen(fault):
    """The simulation is an oracle: each fault shows in one of a few interleavings."""
    spec = spec_of(CpGrid.token_ring(3), 24)
    of_ranks = inputs(spec, 2, torch.float32)
    wanted, layout = in_process(spec, of_ranks), slot_layout([spec.grid], range(3), CommunicatorOptions(slot_bytes=200))
    wrong = 0
    for seed in range(5):
        machine = Machine(layout, 3, wrap=lambda queue: Reordered(queue, fault))
        try:
            assert_equal(by_copies(machine, spec, of_ranks, seed), wanted)
        except AssertionError:
            wrong += 1
    assert wrong
    assert_equal(by_copies(Machine(layout, 3), spec, of_ranks, 0), wanted)


@given(sizes=st.lists(st.integers(1, 50), max_size=4), slot_bytes=st.integers(4, 70))
def test_the_content_of_slots_is_all_bytes_in_order(sizes, slot_bytes):
    tensors = [torch.arange(size, dtype=torch.float32) + 100 * at for at, size in enumerate(sizes)]
    slots = list(contents(tensors, slot_bytes))
    for slot in slots:
        assert [at for at, _ in slot] == list(accumulate((len(piece) for _, piece in slot), initial=0))[:-1]
    filled = [sum(len(piece) for _, piece in slot) for slot in slots]
    assert all(count == slot_bytes for count in filled[:-1])
    together = [piece for slot in slots for _, piece in slot]
    assert not tensors or torch.equal(torch.cat(together), torch.cat(tensors).view(torch.uint8))


def links_of_plans(grid: CpGrid) -> set[Link]:
    """Return the links of all messages of all ranks' plans, where every query sees every key."""
    layouts = [SeqLayout(((at, at + 1),)) for at in range(grid.size)]
    schedules = [Schedule(grid, layouts, Visibility(causal=False), direction) for direction in PASSES]
    steps = [step for schedule in schedules for rank in range(grid.size) for step in schedule.plan(rank).steps]
    messages = [message for step in steps for message in (*step.sends, *step.receives)]
    return {(message.channel, message.source, message.target) for message in messages}


@pytest.mark.parametrize("size", by_lane([2, 4, 8], quick=[2], slow=[8]))
def test_the_slots_of_all_ranks(size):
    """Links are those of all plans; no two slots share bytes, no two signals a word."""
    for grid in grids(size):
        assert all_links(grid) == links_of_plans(grid)
        layout = slot_layout([grid, CpGrid.ring(2)], range(size), CommunicatorOptions(slot_bytes=10))
        for rank in range(size):
            starts = [layout.bytes_of(link, at).start for link in layout.links if link[2] == rank for at in (0, 1)]
            assert sorted(starts) == [10 * at for at in range(len(starts))]
            assert 10 * len(starts) <= layout.num_bytes
        signals = layout.signals("full") | layout.signals("free")
        assert len(signals) == 4 * len(layout.links)
        assert {signal.number for signal in signals} <= set(range(layout.num_signals))


def rings_of(rank: int, sizes: tuple[int, ...]) -> dict[int, range]:
    return {size: range(rank - rank % size, rank - rank % size + size) for size in sizes}


def opened(machines: list[int], peer_copies: str, only: list[int]) -> Any:
    """Return the sizes of rings that take copies where ranks are on machines with these numbers, or the error."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "_machine", lambda: (str(machines[rank]),))
        made = CommunicatorOptions(peer_copies=peer_copies)  # type: ignore[arg-type]
        try:
            groups = open_rings(rings_of(rank, (2, 4)), [CpGrid.ring(size) for size in only], made)
        except ValueError as error:
            return str(error)
    return [size for size, group in groups.items() if group.copies is not None], len(groups[only[0]].channels)


@pytest.mark.full
def test_the_advice_for_rings_out_of_reach(on_ranks):
    """Copies where all reach each other; elsewhere always is refused, and rings of 4 under auto need communicators."""
    assert on_ranks(4, opened, [0, 0, 0, 0], "always", [2, 4]) == [([2, 4], 1)] * 4
    assert on_ranks(4, opened, [0, 0, 1, 1], "always", [2]) == [([2], 1)] * 4
    for error in on_ranks(4, opened, [0, 0, 1, 1], "always", [2, 4]):
        assert 'parallel.cp.peer_copies = "always": ranks 0 and 2, in one ring of 4, do not reach' in error
        assert error.endswith('set parallel.cp.peer_copies = "auto"')
    assert on_ranks(4, opened, [0, 0, 1, 1], "auto", [2, 4]) == [([], 4)] * 4


def refused(*_: object) -> int:
    raise PermissionError(13, "Permission denied")


def too_many(*_: object) -> int:
    raise OSError(24, "Too many open files")


def copies_that_fail(fault: str, peer_copies: str) -> str:
    """Open a ring whose rank 1 cannot open memory, sends no signals, or copies nothing; return the error."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "try_links", partial(reach.try_links, limit_s=0.5))
        if rank == 1:
            at, name, value = {
                "rank 1 cannot lend memory: [Errno 24] Too many open files": (os, "pipe", too_many),
                "cannot open the memory of rank 0": (os, "open", refused),
                "took more than 0 s": (HostMemory, "signal", lambda *_: None),
                "wrong bytes arrived from rank 1": (HostQueue, "copy", lambda *_: None),
            }[fault]
            patch.setattr(at, name, value)
        made = CommunicatorOptions(peer_copies=peer_copies)  # type: ignore[arg-type]
        try:
            open_rings(rings_of(rank, (2,)), [CpGrid.ring(2)], made)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    "fault",
    by_lane(
        [
            "rank 1 cannot lend memory: [Errno 24] Too many open files",
            "cannot open the memory of rank 0",
            "took more than 0 s",
            "wrong bytes arrived from rank 1",
        ],
        quick=["wrong bytes arrived from rank 1"],
    ),
)
def test_copies_that_fail_are_refused_at_the_start(on_ranks, fault):
    """All ranks raise one error, and its advice works."""
    found = on_ranks(2, copies_that_fail, fault, "always")
    assert found[0] == found[1]
    assert fault in found[0]
    assert found[0].startswith("parallel.cp.peer_copies: rank ")
    assert found[0].endswith('; set parallel.cp.peer_copies = "never"')
    assert on_ranks(2, copies_that_fail, fault, "never") == ["", ""]


def full_gpu(rank: int) -> str:
    """Open copies between GPUs where one has no memory left, and the meeting would wait for its rank."""

    def empty(*_: object, **__: object) -> None:
        if dist.get_rank() == rank:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 MiB.\nMore lines")

    def rendezvous(*_: object) -> None:
        raise RuntimeError("the meeting waits for ever")

    made = SimpleNamespace(get_signal_pad_size=lambda: 2048, empty=empty, rendezvous=rendezvous)
    layout = slot_layout([CpGrid.ring(2)], range(2), CommunicatorOptions())
    assert dist.group.WORLD is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_memory, "symmetric", made)
        try:
            open_copies(layout, range(2), dist.group.WORLD, torch.device("cuda", 0), None, high_priority=True)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.full
def test_a_gpu_without_memory_to_lend_is_one_error_of_all_ranks(on_ranks):
    """The advice is that of other copies that fail, which carries it out."""
    assert on_ranks(2, full_gpu, 1) == 2 * [
        "parallel.cp.peer_copies: rank 1 cannot lend memory: CUDA out of memory. Tried to allocate 64 MiB.; "
        'set parallel.cp.peer_copies = "never"'
    ]


def late() -> str:
    """Wait for a message that rank 0 never sends; return the error."""
    rank = dist.get_rank()
    options = CommunicatorOptions(timeout=timedelta(seconds=2), peer_copies="always")
    copies = open_rings(rings_of(rank, (2,)), [CpGrid.ring(2)], options)[2].copies
    assert copies is not None
    found = ""
    if rank == 1:
        first, second = (copies.receive((("keys", "up"), 0, 1), [torch.zeros(3)]) for _ in range(2))
        for done in (first, second):
            with pytest.raises(LostRank) as raised:
                done.wait()
            found += f"{raised.value}; "
    dist.barrier()
    return found


@pytest.mark.full
def test_a_wait_has_a_clock(on_ranks):
    assert on_ranks(2, late)[1] == 2 * "rank 0 gave no signal for 2 s; "


def leftovers() -> tuple[int, int, set[str]]:
    """Return what remains of copies that are no longer used: open files, threads, files in shared memory."""
    import gc
    import threading
    import time

    def held() -> tuple[int, int]:
        threads = [thread for thread in threading.enumerate() if thread.name == "copies"]
        return len(list(Path("/proc/self/fd").iterdir())), len(threads)

    rank = dist.get_rank()
    open_rings(rings_of(rank, (2,)), [CpGrid.ring(2)])  # the groups of gloo stay open
    before, named = held(), {path.name for path in Path("/dev/shm").iterdir()}
    open_again = open_rings(
        rings_of(rank, (2,)), [CpGrid.ring(2)], CommunicatorOptions(peer_copies="always", slot_bytes=64)
    )
    copies = open_again[2].copies
    assert copies is not None
    link: Link = (("keys", "up"), 0, 1)
    x, y = torch.arange(100.0), torch.zeros(100)
    done = copies.send(link, [x]) if rank == 0 else copies.receive(link, [y])
    done.wait()
    assert rank == 0 or torch.equal(x, y)
    assert held()[1]
    while_open = {path.name for path in Path("/dev/shm").iterdir()} - named
    # Rank 0 has ended its copies when rank 1 takes its last message and tells it which slots are free.
    if rank == 1:
        dist.barrier()
        copies.receive(link, [y[:20]]).wait()
        assert torch.equal(y[:20], x[:20] + 1)
    else:
        copies.send(link, [x[:20] + 1]).wait()
    del copies, open_again, done
    gc.collect()
    deadline = time.monotonic() + 10
    while held()[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    if rank == 0:
        dist.barrier()
    return held()[0] - before[0], held()[1], while_open


@pytest.mark.full
def test_nothing_is_left_of_copies(on_ranks):
    """No file has a name while they are used, and threads and pipes end with them."""
    for files, threads, named in on_ranks(2, leftovers):
        assert threads == 0
        assert not {name for name in named if "longring" in name}
        assert files <= 6, "the communicator for sums has connections of its own"


class SymmetricMemory:
    """Stand-in for torch's symmetric memory, which needs a GPU: it notes what is asked of it."""

    def __init__(self) -> None:
        self.pad_bytes, self.calls = 2048, []

    def get_buffer(self, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def put_signal(self, at: int, number: int) -> None:
        self.calls.append(("put", at, number))

    def wait_signal(self, at: int, number: int) -> None:
        self.calls.append(("wait", at, number))


def test_symmetric_memory_is_asked_for_enough(monkeypatch):
    """Peers are counted within the group, and the words of all signals of all of them fit the pad.

    A message begins behind the computation so far, and ends with its own stream.
    """
    memory = SymmetricMemory()
    symmetric = SimpleNamespace(
        get_signal_pad_size=lambda: memory.pad_bytes,
        set_signal_pad_size=lambda size: setattr(memory, "pad_bytes", size),
        empty=lambda size, dtype, device: torch.zeros(size, dtype=dtype),
        rendezvous=lambda own, group: memory,
    )
    stream = SimpleNamespace(wait_stream=lambda other: memory.calls.append(("follow", other)))
    event = SimpleNamespace(record=lambda of: memory.calls.append(("mark", of)))
    monkeypatch.setattr(device_memory, "symmetric", symmetric)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "computation")
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())
    members = range(40, 56)
    layout = slot_layout([CpGrid(2, 4, 2)], members, CommunicatorOptions(slot_bytes=64))
    group: Any = None
    found = device_memory.DeviceMemory(members, layout, lambda mine: [mine], group, torch.device("cuda", 0), -1)
    copies = Copies(layout, found)
    [link] = [link for link in layout.links if link[0] == ("keys", "up") and link[1] == 40][:1]
    assert copies.send(link, [torch.ones(48)]) is event
    peer = link[2] - 40
    full, free = ([layout.number(link[0], slot, kind) for slot in (0, 1)] for kind in ("full", "free"))
    put = [("put", peer, number) for number in full]
    message = [*put, ("wait", peer, free[0]), put[0]]
    assert memory.calls == [("follow", "computation"), *message, ("mark", stream)]
    assert found.of(link[2])[layout.bytes_of(link, 1)].view(torch.float32).eq(1).all()
    assert max(signal.number for signal in layout.signals("free")) * len(members) + 15 < memory.pad_bytes // 4
