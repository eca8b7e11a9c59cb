"""The meeting of the ranks of a start at one address, and the end of all of them if something else listens there."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from .world import World

ANSWER_S = 10.0
"""Seconds that a listener may take to answer."""
_NOT_OURS = "the process that listens there is not of this start"
FREE_PORT = "name the first machine and a port that is free there, and give the same command again"
"""Advice of every error of a meeting."""


def meet(world: World, timeout: timedelta = timedelta(minutes=10)) -> Store:
    """Return the key-value store of the ranks of this start, through which they then join. Collective.

    `timeout` bounds the wait for other ranks. Ranks that have joined already get the store of their process group.
    Raises ConnectionError within seconds, on every rank, if another process listens at the port.
    """
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    store = _host(world, timeout) if world.rank == 0 and not world.hosted else _visit(world, timeout)
    store.set_timeout(timeout)
    return store


def reach(name: str, address: str, port: int, timeout: timedelta) -> TCPStore:
    """Return the store at an address, once something listens there.

    Raises ConnectionError, which begins with `name`, after `timeout` if nothing does, and within seconds if the address
    is unknown or the listener does not answer as a store.
    """
    _resolve(name, address, port)
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=ANSWER_S).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(f"{name}: cannot be reached: {error}; {FREE_PORT}") from error
        time.sleep(0.2)
    found: list[TCPStore] = []

    def connect() -> None:
        try:
            found.append(TCPStore(address, port, None, False, timedelta(seconds=ANSWER_S), wait_for_workers=False))
        except (dist.DistError, ValueError):
            return

    # torch waits without a limit for a listener that is silent: the thread then waits until the process ends.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not found:
        raise ConnectionError(f"{name}: {_NOT_OURS}; {FREE_PORT}")
    return found[0]


def _resolve(name: str, address: str, port: int) -> None:
    try:
        socket.getaddrinfo(address, port)
    except socket.gaierror as error:
        raise ConnectionError(f"{name}: no machine has this name: {error}; {FREE_PORT}") from error


def _name(world: World) -> str:
    return f"MASTER_ADDR = {world.address}, MASTER_PORT = {world.port}"


def _host(world: World, timeout: timedelta) -> TCPStore:
    _resolve(_name(world), world.address, world.port)
    try:
        store = TCPStore(world.address, world.port, None, True, timeout, wait_for_workers=False)
    except dist.DistError as error:
        reason = "the port is in use here" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ConnectionError(f"{_name(world)}: {reason}; {FREE_PORT}") from error
    store.set("world", str(world.size))
    return store


def _visit(world: World, timeout: timedelta) -> TCPStore:
    # torchrun listens before it starts a rank, so a refused connection means that it has ended.
    store = reach(_name(world), world.address, world.port, timedelta(minutes=1) if world.hosted else timeout)
    if world.hosted:
        return store
    # Rank 0 writes the size of its world as soon as it listens. The store of another start has no such key, or another
    # size, or has met this rank already.
    deadline = time.monotonic() + ANSWER_S
    while not store.check(["world"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    met = store.check(["world"]) and store.get("world") == str(world.size).encode()
    if not met or store.add(f"rank {world.rank}", 1) > 1:
        raise ConnectionError(f"{_name(world)}: {_NOT_OURS}; {FREE_PORT}")
    return store
