"""Run a function of a test on several processes joined by gloo.

Each call forks its ranks from a server that has imported torch, DeepSpeed and Megatron once: a start costs a fraction
of a second, and no rank outlives its call. (A gloo group leaves threads behind, which burn processor time for as long
as their process lives.) A function is named by its file and name, since test modules are not importable packages.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

TIMEOUT_S = 300
# DeepSpeed imports its two with the first engine, and compiles programs for them: here once for all ranks.
PRELOADED = [
    "longring.launch.train",
    "hypothesis",
    "pytest",
    "helpers.faulty",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "longring.parallel.cp.walk_halves",
    "longring.parallel.cp.slices",
    "helpers.frozen",
]


# A process has one server, which `longring order` may start as well: the first to start it decides what it imports.
multiprocessing.set_forkserver_preload(PRELOADED)


@functools.cache
def fork_server() -> ForkServerContext:
    """Return the context whose processes are forked from one server with everything imported."""
    # The server passes over what it cannot import, and knows only the path that its environment names.
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def become_rank(variables: dict[str, str]) -> None:
    """Replace the environment of a forked process, which is the server's; use one thread."""
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)


def variables_of(rank: int, world_size: int, port: int = 1) -> dict[str, str]:
    """Return the variables that torchrun would set for a rank on one node."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), **address}


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` new processes in one process group and return the results by rank.

    Raises AssertionError with the traceback of the first rank that fails.
    """
    # The ranks meet at a server of this process; a store in a file would be read again and again by all of them.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    named = (function.__code__.co_filename, function.__name__, args)
    waiting: dict[Connection, int] = {}
    processes = []
    try:
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            variables = variables_of(rank, world_size, store.port)
            environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
            process = fork_server().Process(target=_call, args=(environment, theirs, *named), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            waiting[ours] = rank
        return _results(waiting)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _results(waiting: dict[Connection, int]) -> list[Any]:
    results: list[Any] = [None] * len(waiting)
    while waiting:
        ready = wait(list(waiting), timeout=TIMEOUT_S)
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} gave no answer within {TIMEOUT_S} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, value = False, "the process ended"
            if not ok:
                raise AssertionError(f"rank {rank}: {value}")
            results[rank] = value
    return results


def _call(environment: dict[str, str], pipe: Connection, file: str, name: str, args: tuple[Any, ...]) -> None:
    become_rank(environment)
    dist.init_process_group(
        "gloo",
        store=TCPStore("127.0.0.1", int(environment["MASTER_PORT"]), is_master=False),
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        spec = importlib.util.spec_from_file_location(f"ranks_{Path(file).stem}", file)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        answer = (True, getattr(module, name)(*args))
    except BaseException:  # pytest's own outcomes are no Exception; the caller raises whatever it was
        answer = (False, traceback.format_exc())
    dist.destroy_process_group()
    pipe.send_bytes(pickle.dumps(answer))  # by value: tensors that a pipe shares are gone when their process ends
