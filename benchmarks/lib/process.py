"""Facts and settings of a process: one core, versions, peak memory, a free port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path


def use_one_core() -> None:
    """Keep this process and the processes that it starts on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def versions() -> dict[str, str]:
    """Return the versions of the packages that training computes with, of NCCL and of the driver, as far as known."""
    found = {}
    for package in ("torch", "triton", "deepspeed", "megatron-core", "liger-kernel", "nvidia-nccl-cu13"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if program := shutil.which("nvidia-smi"):
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        found["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found


def peak_megabytes() -> float:
    """Return the largest resident memory of this process so far, in MB of 2^20 bytes.

    getrusage would count the parent's memory, which a child shares until it is replaced.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    [peak] = [line for line in status if line.startswith("VmHWM")]
    return int(peak.split()[1]) / 1024


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
