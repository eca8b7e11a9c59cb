"""The faults of benchmarks/soak.py, and the run that they happen to."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from . import ROOT

RECIPE = ROOT / "launch" / "recipes" / "demo.toml"
END_S = 180.0
"""Most seconds that a start may take to end after a fault, or to do its next step."""


class Training:
    """Starts of one run on two ranks, with the command of `longring train`, in directories of their own."""

    def __init__(self, folder: Path, settings: list[str], name: str = "run") -> None:
        self.run = folder / name
        self.data = folder / "data"
        self.control = folder / "failing"
        self.output = folder / "output.txt"
        self.statuses: list[int] = []
        """Exit statuses of the starts so far."""
        self.launcher: psutil.Popen | None = None
        self._settings = [f"run_directory={self.run}", f"data.directory={self.data}", *settings]
        library = folder / "failing_files.so"
        if not library.exists():
            source = Path(__file__).with_name("failing_files.c")
            subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
        self._environment = {
            **os.environ,
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
            "LD_PRELOAD": str(library),
            "FAILING_FILES": str(self.control),
        }

    def command(self, *words: str) -> None:
        """Run a command of `longring` on the recipe, and raise CalledProcessError unless it succeeds."""
        full = [sys.executable, "-m", "longring.launch.cli", words[0], str(RECIPE), *self._settings, *words[1:]]
        subprocess.run(full, check=True, env=self._environment, stdout=sys.stderr)

    def start(self, *options: str) -> None:
        """Start the ranks; always the same command, but for `options`."""
        words = ["train", str(RECIPE), *self._settings, "--ranks", "2", *options]
        self._said_from = self.output.stat().st_size if self.output.exists() else 0
        with self.output.open("a") as output:
            self.launcher = psutil.Popen(
                [sys.executable, "-m", "longring.launch.cli", *words],
                env=self._environment,
                stdout=output,
                stderr=output,
            )

    @property
    def running(self) -> bool:
        """Whether the last start has not ended."""
        return self.launcher is not None and self.launcher.poll() is None

    @property
    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks."""
        assert self.launcher is not None
        return self.launcher.children()

    @property
    def said(self) -> str:
        """All that the last start printed, in one line."""
        return " ".join(self.output.read_text()[self._said_from :].split())

    def step(self) -> int:
        """Return the last step in the metrics, or 0."""
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 1000))
                return json.loads(file.read().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError):  # no file yet, or a line that is being written
            return 0

    def records(self, name: str) -> list[dict]:
        """Return the lines of starts.jsonl or events.jsonl."""
        file = self.run / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait(self, condition: Callable[[], object]) -> bool:
        """Wait until the condition holds or the start has ended; return whether the condition holds."""
        deadline = time.monotonic() + END_S
        while not (met := bool(condition())) and self.running and time.monotonic() < deadline:
            time.sleep(0.1)
        return met or bool(condition())

    def end(self) -> int:
        """Wait until the start has ended; return its exit status, negative for a signal. It is killed if it hangs."""
        assert self.launcher is not None
        try:
            status = int(self.launcher.wait(END_S))
        except psutil.TimeoutExpired:
            self.kill()
            status = -signal.SIGABRT  # no start ends so by itself
        self.statuses.append(status)
        return status

    def stop(self) -> None:
        """Let the ranks save and stop."""
        assert self.launcher is not None
        self.launcher.send_signal(signal.SIGTERM)
        self.end()

    def kill(self) -> None:
        """Kill what still runs."""
        if self.launcher is not None and self.launcher.is_running():
            for process in [*self.launcher.children(recursive=True), self.launcher]:
                process.kill()

    @contextmanager
    def failing(self, call: str, number: int, rank: int, text: str) -> Iterator[None]:
        """Let a system call fail with an error number on files of one rank whose paths contain `text`."""
        begun = self.control.with_suffix(".begun")
        begun.write_text(f"{call} {number} {rank} {text}")
        begun.rename(self.control)
        try:
            yield
        finally:
            self.control.unlink()

    @contextmanager
    def full_disk(self, rank: int) -> Iterator[None]:
        """Fill the run's own small disk; without one, let the writes of a rank fail as on a full disk."""
        if not self.run.is_mount():
            with self.failing("write", errno.ENOSPC, rank, f"{self.run}/"):
                yield
            return
        ballast = self.run / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        yield
        ballast.unlink()


def kill_a_rank(run: Training, chance: random.Random) -> None:
    chance.choice(run.ranks).kill()
    run.end()


def tell_the_launcher(run: Training, chance: random.Random) -> None:
    run.stop()


def tell_a_rank(run: Training, chance: random.Random) -> None:
    chance.choice(run.ranks).send_signal(signal.SIGUSR1)
    run.end()


def stop_a_rank(run: Training, chance: random.Random) -> None:
    chance.choice(run.ranks).suspend()
    run.end()


def pause_a_rank(run: Training, chance: random.Random) -> None:
    rank = chance.choice(run.ranks)
    rank.suspend()
    time.sleep(chance.uniform(2, 7))
    rank.resume()


def kill_the_launcher(run: Training, chance: random.Random) -> None:
    assert run.launcher is not None
    ranks = run.ranks
    run.launcher.kill()
    run.end()
    _, alive = psutil.wait_procs(ranks, END_S)
    assert not alive, f"ranks {alive} outlive their launcher"


def fail_to_read_a_checkpoint(run: Training, chance: random.Random) -> None:
    run.stop()
    with run.failing("read", errno.EIO, chance.randrange(2), "/checkpoints/step-"):
        run.start()
        run.end()
    assert not list(run.run.glob("checkpoints/*.damaged")), "a checkpoint that cannot be read is not damaged"


def fail_to_open_a_shard(run: Training, chance: random.Random) -> None:
    run.stop()
    with run.failing("open", errno.ESTALE, chance.randrange(2), f"{run.data}/shards/"):
        run.start()
        run.end()


def fail_to_write_a_checkpoint(run: Training, chance: random.Random) -> None:
    before = len(run.records("events.jsonl"))
    with run.failing("write", errno.EIO, chance.randrange(2), ".partial/"):
        run.wait(lambda: len(run.records("events.jsonl")) > before)
    if not run.running:
        run.end()


def fill_the_disk(run: Training, chance: random.Random) -> None:
    before = len(run.records("events.jsonl"))
    with run.full_disk(chance.randrange(2)):
        run.wait(lambda: len(run.records("events.jsonl")) > before or "No space left" in run.said)
        time.sleep(chance.uniform(0, 10))
    if not run.running:
        run.end()


def flip_a_byte_of_a_shard(run: Training, chance: random.Random) -> None:
    """Change a token of a shard between two starts, and run the command that the error names."""
    run.stop()
    shard = chance.choice(sorted(run.data.rglob("train*.tar")))
    with shard.open("r+b") as file:
        file.seek(700)
        byte = file.read(1)[0]
        file.seek(700)
        file.write(bytes([byte ^ 1]))
    run.start()
    run.end()
    advice = re.search(r"run `longring (\w+) RECIPE([^`]*)`, which makes it again", run.said)
    assert advice is not None, run.said
    run.command(advice[1], *advice[2].split())


@contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[None]:
    """Mount a file system of its own on `directory` where that is allowed, which takes root."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", directory]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", directory], check=True)


Fault = Callable[[Training, random.Random], None]
FAULTS: dict[str, tuple[Fault, set[tuple[int, ...]]]] = {
    "rank killed": (kill_a_rank, {(128 + signal.SIGKILL,)}),
    "SIGTERM to the launcher": (tell_the_launcher, {(75,)}),
    "SIGUSR1 to a rank": (tell_a_rank, {(75,)}),
    "rank stopped (hang)": (stop_a_rank, {(75,), (128 + signal.SIGKILL,)}),
    "rank stopped for 2 to 7 s": (pause_a_rank, {()}),
    "launcher killed": (kill_the_launcher, {(-signal.SIGKILL,)}),
    "checkpoint: EIO at reading": (fail_to_read_a_checkpoint, {(75, 74)}),
    "shard: ESTALE at opening": (fail_to_open_a_shard, {(75, 74)}),
    "checkpoint: EIO at writing": (fail_to_write_a_checkpoint, {()}),
    "disk full": (fill_the_disk, {(), (74,)}),
    "byte of a shard flipped": (flip_a_byte_of_a_shard, {(75, 2), (75, 74)}),
}
"""Each fault, and the exit statuses of the starts that it may end; without one the start goes on."""
