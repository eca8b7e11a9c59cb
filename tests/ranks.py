"""Run a function of a test on several processes joined by gloo.

Processes are started once for each world size and kept for the whole run: starting four of them costs seconds, most
tests take less. A function is named by its file and name, since test modules are not importable packages.
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
    """`world_size` processes that have called init_process_group; `run` calls a function on all of them."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.directory = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self.directory.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank -> its results by rank. Raises AssertionError with the first traceback."""
        for pipe in self.pipes:
            pipe.send((function.__code__.co_filename, function.__name__, args))
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


def _serve(rank: int, world_size: int, directory: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    modules: dict[str, Any] = {}
    while True:
        try:
            file, name, args = pipe.recv()
        except EOFError:
            return
        try:
            if file not in modules:
                spec = importlib.util.spec_from_file_location(f"ranks_{Path(file).stem}", file)
                assert spec and spec.loader
                modules[file] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[file])
            answer = (True, getattr(modules[file], name)(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
