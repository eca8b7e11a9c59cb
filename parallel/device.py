"""This rank's device, and the environment that CUDA, NCCL and Triton read when they start on it."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from .config import ParallelConfig
from .world import World


def this_device(parallel: ParallelConfig, world: World, timeout_minutes: float) -> torch.device:
    """Return GPU LOCAL_RANK with its environment set, or the CPU on a machine without GPUs.

    `timeout_minutes` is the time limit of collectives. Raises ValueError if Triton's default cache is another user's,
    and on a CPU for quantized collectives.
    """
    if not torch.cuda.is_available():
        for name in ("zero_quantized_weights", "zero_quantized_gradients"):
            if getattr(parallel.zero, name):
                raise ValueError(
                    f"parallel.zero.{name} = True: DeepSpeed's quantized collectives need GPUs; set it to false on a "
                    "machine without them"
                )
        return torch.device("cpu")
    device = torch.device("cuda", world.local_rank)
    # `start_ranks` sets it for the ranks that it starts. For others it may be too late here: CUDA reads the variable
    # when it starts, and an import may have started it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(parallel.gpu_queues))
    # torch ends a process whose NCCL thread gives no sign of life; the run's watchdog comes first and reports more.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(60 * timeout_minutes) + 60))
    # NCCL gives every pair of a communicator the number of CTAs of the pair with the fewest. Across nodes its default
    # is 1 to 4, and a ring inside a node that shares its communicators with a ring across nodes would get no more.
    os.environ.setdefault("NCCL_NCHANNELS_PER_NET_PEER", str(parallel.cp.max_ctas))
    torch.cuda.set_device(device)
    # Triton's cache goes to a local disk, since home directories on a network file system are slow. One directory
    # serves all ranks of the node: Triton writes each file under another name and renames it, so no rank reads half
    # of a file that another is writing. The files are code that this process runs: nobody else may write them.
    if "TRITON_CACHE_DIR" not in os.environ:
        own = private_directory(Path(tempfile.gettempdir(), f"triton-{os.getuid()}"))
        os.environ["TRITON_CACHE_DIR"] = str(own)
    # By default FlashAttention-4 keeps no compiled kernels, and its cache directory is one that other users may write.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", f"{os.environ['TRITON_CACHE_DIR']}/flash_attention_4")
    return device


def private_directory(path: Path) -> Path:
    """Return `path`, made for this user alone if it is missing. Raises ValueError if it is another user's."""
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()  # of a link itself, which its owner can lead elsewhere
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(
            f"TRITON_CACHE_DIR: not set, and its default {path} is not a directory of user {os.getuid()}; set it to a "
            "directory of your own on a local disk"
        )
    path.chmod(0o700)
    return path
