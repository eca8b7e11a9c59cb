"""Reach: which ranks can copy into each other's memory, and the opening and the trial of their copies."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .copies import SLOTS, Copies, SlotLayout
from .device_memory import DeviceMemory
from .host_memory import HostMemory
from .topology import PeerCopies

OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""Variable with which torch's symmetric memory lets several ranks share a GPU."""
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Variable with the number of queues of a GPU, 1 under tensor parallelism (`ParallelConfig.gpu_queues`)."""
TIMEOUT = timedelta(minutes=30)
"""Longest wait for a message if the group has no limit of its own."""
TRIAL_S = 60.0
"""Longest wait for the first messages of all links."""


def sizes_in_reach(
    sizes: Sequence[int], members: Sequence[int], wanted: PeerCopies, device: torch.device, group: dist.ProcessGroup
) -> set[int]:
    """Return the sizes of rings that take copies, equal on all ranks.

    `members` are the global ranks of the largest ring, and `group` is their process group. A size takes copies if all
    ranks of every ring of that size reach each other. Collective, unless `wanted` or the device rules copies out.
    Raises ValueError on every rank if `wanted` is always and two ranks of a ring do not reach each other.
    """
    # With a single queue on the GPU, a copy that waits blocks everything behind it, computation included.
    if wanted == "never" or (wanted == "auto" and (device.type == "cpu" or os.environ.get(QUEUES) == "1")):
        return set()
    found = dict(zip(members, _gathered((_machine(), _gpu(device)), group), strict=True))  # by global rank
    mine = {
        rank
        for rank, (machine, gpu) in found.items()
        if rank == dist.get_rank() or (machine == _machine() and _can_access(device, gpu))
    }
    reached = dict(zip(members, _gathered(mine, group), strict=True))  # the ranks that each one reaches
    within = set()
    for size in (size for size in sizes if size > 1):
        for ring in (members[at : at + size] for at in range(0, len(members), size)):  # aligned runs of members
            apart = [(a, b) for a in ring for b in ring if b not in reached[a]]
            if apart and wanted == "always":
                raise ValueError(
                    f'parallel.cp.peer_copies = "always": ranks {apart[0][0]} and {apart[0][1]}, in one ring of '
                    f"{size}, do not reach each other's memory (another machine or container, or GPUs without peer "
                    'access); set parallel.cp.peer_copies = "auto"'
                )
            if apart:
                break
        else:
            within.add(size)
    return within


def open_copies(
    layout: SlotLayout,
    members: Sequence[int],
    group: dist.ProcessGroup,
    device: torch.device,
    timeout: timedelta | None,
    *,
    high_priority: bool,
    waiting: dist.ProcessGroup | None = None,
) -> Copies:
    """Return the links of this rank to the other `members`, which are those of `group`; each was tried. Collective.

    Raises ValueError if the memory of a peer cannot be opened, or if a message arrives wrong or late: on every rank of
    `waiting` (None: of `group`), all of which open copies at once.
    """

    def gather(mine: Any) -> list[Any]:
        return _gathered(mine, group)

    copies, failed = None, None
    try:
        if device.type == "cuda":
            memory = DeviceMemory(members, layout, gather, group, device, priority=-1 if high_priority else 0)
        else:
            memory = HostMemory(dist.get_rank(), members, layout, gather, (timeout or TIMEOUT).total_seconds())
        copies = Copies(layout, memory)
        failed = try_links(copies, dist.get_rank(), device)
    except (OSError, RuntimeError) as error:
        failed = str(error)
    # Gathered before any rank raises: the others would wait for it.
    errors = [error for error in _gathered(failed, waiting or group) if error]
    if copies is None or errors:
        raise ValueError(f'parallel.cp.peer_copies: {errors[0]}; set parallel.cp.peer_copies = "never"')
    return copies


def try_links(copies: Copies, rank: int, device: torch.device, limit_s: float = TRIAL_S) -> str | None:
    """Send messages of known bytes over all links of a rank, through every slot twice; return an error text, or None.

    Collective among the ranks of the links. The host waits for a limited time, so that a machine whose copies hang
    ends with an error.
    """
    sent, received, ends = [], [], []
    for turn in range(2 * SLOTS):
        for at, link in enumerate(sorted(copies.layout.links)):  # the same order on all ranks
            if rank not in link[1:]:
                continue
            known = torch.arange(at + turn, at + turn + 251, device=device).to(torch.uint8)  # differs by link and turn
            if rank == link[1]:
                sent.append(known)
                ends.append(copies.send(link, [known]))
            else:
                received.append((link, known, torch.empty_like(known)))
                ends.append(copies.receive(link, [received[-1][2]]))
    deadline = time.monotonic() + limit_s
    while not all(end.query() for end in ends):
        if time.monotonic() > deadline:
            return f"rank {rank}: messages to or from other ranks took more than {limit_s:.0f} s"
        time.sleep(1e-3)
    for end in ends:
        end.wait()  # returns at once, and raises the error of a queue that has failed
    wrong = [link for link, known, got in received if not torch.equal(known, got)]
    return f"rank {rank}: wrong bytes arrived from rank {wrong[0][1]}" if wrong else None


def _gathered(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def _machine() -> tuple[str, ...]:
    """Return a value that ranks share if they run on one machine and see each other's processes and files."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, *(str(Path(f"/proc/self/ns/{namespace}").readlink()) for namespace in ("pid", "mnt"))


def _gpu(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _can_access(device: torch.device, gpu: str | None) -> bool:
    """Return whether this rank's device can access that of another rank; a CPU reaches all memory of its machine."""
    if device.type == "cpu":
        return True
    if gpu == _gpu(device):  # two ranks on one GPU
        return os.environ.get(OVERLAPPING) == "1"
    numbers = {_gpu(torch.device("cuda", number)): number for number in range(torch.cuda.device_count())}  # by uuid
    return gpu in numbers and torch.cuda.can_device_access_peer(device, numbers[gpu])
