"""Checks of the machine that ranks run on, and a record of its environment."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from ..checkpoint.format import last_good_checkpoint
from ..config import Recipe
from ..run_directory import RunDirectory

_NAMES = """
CUBLAS_WORKSPACE_CONFIG CUDA_DEVICE_MAX_CONNECTIONS CUDA_DEVICE_ORDER CUDA_HOME CUDA_LAUNCH_BLOCKING CUDA_MODULE_LOADING
CUDA_VISIBLE_DEVICES GLOO_SOCKET_IFNAME HF_DATASETS_CACHE HF_DATASETS_OFFLINE HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE
LD_LIBRARY_PATH LD_PRELOAD LONGRING_CONTAINER LONGRING_LOCAL_DIR LONGRING_MOUNTS LONGRING_PORT LONGRING_PYTHON
LONGRING_RANKS_PER_NODE LONGRING_STEP_WAIT_S
MALLOC_ARENA_MAX MKL_NUM_THREADS NCCL_ALGO NCCL_ASYNC_ERROR_HANDLING NCCL_BLOCKING_WAIT NCCL_BUFFSIZE
NCCL_COLLNET_ENABLE NCCL_COMM_BLOCKING NCCL_CROSS_NIC NCCL_CUMEM_ENABLE NCCL_DEBUG NCCL_DEBUG_FILE NCCL_DEBUG_SUBSYS
NCCL_DMABUF_ENABLE NCCL_GRAPH_FILE NCCL_IB_ADAPTIVE_ROUTING NCCL_IB_DISABLE NCCL_IB_GID_INDEX NCCL_IB_HCA
NCCL_IB_PCI_RELAXED_ORDERING NCCL_IB_QPS_PER_CONNECTION NCCL_IB_RETRY_CNT NCCL_IB_SL NCCL_IB_TC NCCL_IB_TIMEOUT
NCCL_LAUNCH_MODE NCCL_MAX_CTAS NCCL_MAX_NCHANNELS NCCL_MIN_CTAS NCCL_MIN_NCHANNELS NCCL_NCHANNELS_PER_NET_PEER NCCL_NET
NCCL_NET_GDR_LEVEL NCCL_NET_GDR_READ NCCL_NET_PLUGIN NCCL_NSOCKS_PERTHREAD NCCL_NTHREADS NCCL_NVB_DISABLE
NCCL_NVLS_ENABLE NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_PROTO NCCL_PXN_DISABLE NCCL_SHM_DISABLE NCCL_SOCKET_FAMILY
NCCL_SOCKET_IFNAME NCCL_SOCKET_NTHREADS NCCL_TOPO_FILE NCCL_TUNER_PLUGIN NVIDIA_TF32_OVERRIDE NVIDIA_VISIBLE_DEVICES
OMP_NUM_THREADS OMP_PLACES OMP_PROC_BIND PYTHONHASHSEED PYTHONPATH PYTHONSAFEPATH PYTORCH_ALLOC_CONF
PYTORCH_CUDA_ALLOC_CONF SLURMD_NODENAME SLURM_ARRAY_JOB_ID SLURM_CLUSTER_NAME SLURM_CPUS_ON_NODE SLURM_GPUS_ON_NODE
SLURM_JOB_ACCOUNT SLURM_JOB_ID SLURM_JOB_NAME SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_JOB_PARTITION SLURM_JOB_QOS
SLURM_MEM_PER_NODE SLURM_NNODES SLURM_NODEID SLURM_NTASKS SLURM_RESTART_COUNT SLURM_STEP_ID SLURM_SUBMIT_DIR
SLURM_TMPDIR TORCHINDUCTOR_CACHE_DIR TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_CPP_LOG_LEVEL TORCH_CUDA_ARCH_LIST
TORCH_DISTRIBUTED_DEBUG TORCH_FR_BUFFER_SIZE TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_AVOID_RECORD_STREAMS
TORCH_NCCL_BLOCKING_WAIT TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_NCCL_HIGH_PRIORITY
TRITON_CACHE_DIR TRITON_INTERPRET UCX_IB_GPU_DIRECT_RDMA UCX_NET_DEVICES UCX_TLS
"""
RECORDED = frozenset(_NAMES.split())
"""Environment variables that a start records: they change speed or results. No other variable is recorded."""


def environment() -> dict[str, Any]:
    """Return the environment variables that the libraries read, the devices, the CUDA version and the number of CPUs.

    Only the variables in `RECORDED` are returned.
    """
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "variables": {name: os.environ[name] for name in sorted(RECORDED & os.environ.keys())},
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
                if not math.isclose(float((ones @ ones).sum()), 256.0**3):  # 256 x 256 elements of 256 each
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
        run.check_writable()
        if (free := shutil.disk_usage(run.path).free) < disk:
            wrong.append(
                f"{free / 1e9:.1f} GB free in {run.path}, {disk / 1e9:.1f} needed (slurm.min_free_disk_gb, or two "
                "checkpoints)"
            )
    except OSError as error:
        wrong.append(str(error).partition(";")[0])
    # Ranks without GPUs, on one node, may talk through the loopback interface.
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
    states = [file.read_text() for file in devices.glob("*/ports/*/state")]  # "4: ACTIVE"
    return sum("ACTIVE" in state for state in states), len(states)
