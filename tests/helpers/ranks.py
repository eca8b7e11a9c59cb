"""Run a function of a test on several processes joined by gloo.

Processes are started once for each world size and kept for the whole run: starting four of them costs seconds, most
tests take less. Each call joins a process group of its own and leaves it at the end, with every group made within: a
gloo group has threads, and left-over ones would pile up. A function is named by its file and name, since test modules
are not importable packages.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_S = 300


class Ranks:
    """`world_size` processes; `run` joins them in a process group and calls a function on all."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.directory = tempfile.TemporaryDirectory()
        self.calls = 0
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank -> its results by rank. Raises AssertionError with the first traceback."""
        self.calls += 1
        store = f"file://{self.directory.name}/store-{self.calls}"
        for pipe in self.pipes:
            pipe.send((store, function.__code__.co_filename, function.__name__, args))
        waiting = dict(zip(self.pipes, range(len(self.pipes)), strict=True))
        results: list[Any] = [None] * len(self.pipes)
        while waiting:
            ready = wait(list(waiting), timeout=TIMEOUT_S)
            if not ready:
                self.stop()
                raise AssertionError(f"ranks {sorted(waiting.values())} gave no answer within {TIMEOUT_S} s")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process ended"
                if not ok:
                    self.stop()
                    raise AssertionError(f"rank {rank}: {value}")
                results[rank] = value
        return results

    @property
    def alive(self) -> bool:
        """Whether all processes still answer."""
        return all(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    modules: dict[str, Any] = {}
    while True:
        try:
            store, file, name, args = pipe.recv()
        except EOFError:
            return
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S)
        )
        try:
            if file not in modules:
                spec = importlib.util.spec_from_file_location(f"ranks_{Path(file).stem}", file)
                assert spec
                assert spec.loader
                modules[file] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[file])
            answer = (True, getattr(modules[file], name)(*args))
        except BaseException:  # pytest's own outcomes are no Exception; `run` raises whatever it was
            answer = (False, traceback.format_exc())
        dist.destroy_process_group()
        pipe.send(answer)
