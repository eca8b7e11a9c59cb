"""Checks of the machine that ranks run on, and a record of its environment."""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from ...data.files import write_text
from ..checkpoint.format import last_good_checkpoint
from ..config import Recipe
from ..run_directory import RunDirectory

_VARIABLES = re.compile(
    "(CUBLAS|CUDA|DS|GLOO|HF|LONGRING|MALLOC|MKL|NCCL|NVIDIA|OMP|PYTORCH|PYTHON|SLURM|TORCH|TRITON|UCX)_.*|LD_PRELOAD"
)
_SECRET = re.compile("KEY|PASS|SECRET|TOKEN|CREDENTIAL|JWT", re.IGNORECASE)


def environment() -> dict[str, Any]:
    """Return the environment variables that the libraries read, the devices, the CUDA version and the number of CPUs.

    Variables whose names suggest a secret are left out.
    """
    variables = {name: os.environ[name] for name in sorted(os.environ) if _VARIABLES.fullmatch(name)}
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "variables": {name: value for name, value in variables.items() if not _SECRET.search(name)},
        "devices": [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices],
        "cuda": torch.version.cuda,
        "cpus": len(os.sched_getaffinity(0)),
    }


def check_node(recipe: Recipe, ranks: int) -> None:
    """Raise ValueError with every fault of this node: devices, memory, disk, links."""
    wrong = []
    if not recipe.slurm.cpu:
        if (seen := torch.cuda.device_count()) < ranks:
            wrong.append(f"{seen} GPUs for {ranks} ranks (slurm.ranks_per_node, slurm.cpu)")
        for device in range(min(seen, ranks)):
            # A small product finds GPUs that are present but fail or compute wrongly.
            try:
                ones = torch.ones(256, 256, device=f"cuda:{device}")
                if not math.isclose(float((ones @ ones).sum()), 256.0**3):
                    wrong.append(f"GPU {device} computes wrong products")
            except RuntimeError as error:
                wrong.append(f"GPU {device} cannot be used: {str(error).splitlines()[0]}")
    needed = ranks * recipe.slurm.min_free_memory_gb * 1e9
    if (free := psutil.virtual_memory().available) < needed:
        wrong.append(f"{free / 1e9:.1f} GB of memory free, {needed / 1e9:.1f} needed (slurm.min_free_memory_gb a rank)")
    run = RunDirectory(recipe.run_directory)
    found = last_good_checkpoint(run.checkpoints)
    # Room for two checkpoints: the next one is written before the oldest is deleted.
    disk = max(recipe.slurm.min_free_disk_gb * 1e9, 2 * found[1].num_bytes if found else 0)
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        probe = run.logs / f".probe-{os.uname().nodename}-{os.getpid()}"
        write_text(probe, "written")
        probe.unlink()
        if (free := shutil.disk_usage(run.path).free) < disk:
            wrong.append(
                f"{free / 1e9:.1f} GB free in {run.path}, {disk / 1e9:.1f} needed (slurm.min_free_disk_gb, or two "
                "checkpoints)"
            )
    except OSError as error:
        wrong.append(f"run directory {run.path} cannot be written: {error}")
    if not any(link.isup for name, link in psutil.net_if_stats().items() if name != "lo" or recipe.slurm.cpu):
        wrong.append("no network interface is up")
    active, ports = rdma_ports()
    if active < (wanted := recipe.slurm.min_rdma_ports or min(1, ports)):
        wrong.append(f"{active} of {ports} InfiniBand or RoCE ports active, {wanted} needed (slurm.min_rdma_ports)")
    if wrong:
        raise ValueError(
            f"node {os.environ.get('SLURMD_NODENAME', os.uname().nodename)}: not fit to train: {', '.join(wrong)}; "
            "exclude it with sbatch --exclude, repair it, or lower the requirement"
        )


def rdma_ports(devices: Path = Path("/sys/class/infiniband")) -> tuple[int, int]:
    """Return the number of active InfiniBand and RoCE ports of this machine, and the number of all of them."""
    states = [file.read_text() for file in devices.glob("*/ports/*/state")]
    return sum("ACTIVE" in state for state in states), len(states)
