"""Classification of a rank's errors: full memory, an error of its own GPU or of NCCL on this rank, or a lost rank."""

from __future__ import annotations

import errno
import re

import torch
import torch.distributed as dist

_CUDA = re.compile(
    r"(?:CUDA (?:driver )?error: |cuDNN error: |Triton Error \[CUDA\]: |Cuda failure (?:\d+ )?')([^\n']+)"
)
"""Reason that CUDA gives, in an error of torch, of Triton or of NCCL."""
_FULL = re.compile("out of memory|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED")
_REMOTE = re.compile(r"remote (?:process|error)|network error|timed? ?out", re.IGNORECASE)
"""Errors in which NCCL names another rank; its others, such as a full /dev/shm, are those of this rank."""


class PeerError(RuntimeError):
    """Another rank of a context-parallel group is gone or does not answer."""


class LostRank(dist.DistNetworkError):
    """Another rank has ended, or does not answer in time."""

    def __init__(self, rank: int, reason: str) -> None:
        """Take the global rank that is lost, and the reason as the rest of a sentence that begins with "rank N"."""
        super().__init__(f"rank {rank} {reason}")
        self.rank = rank


def full_memory(error: BaseException) -> str | None:
    """Return which memory is full, and the reason that its allocator gives; None for any other error."""
    text = (str(error) or type(error).__name__).partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"GPU memory: {text}"
    if (reason := _cuda(error)) and _FULL.search(reason):
        return f"GPU memory: {reason}"
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "allocate memory" in text)
    ):
        return f"memory: {text}"
    return error.__cause__ and full_memory(error.__cause__)


def gpu_error(error: BaseException) -> str | None:
    """Return the report of a GPU, such as an illegal memory access; None for any other error, and for full memory."""
    reason = _cuda(error)
    if reason is not None:
        return None if _FULL.search(reason) else reason
    return error.__cause__ and gpu_error(error.__cause__)


def local_nccl_error(error: BaseException) -> str | None:
    """Return NCCL's reason for a failure of this rank, such as two ranks on one GPU; None for any other error."""
    text = str(error)
    if not isinstance(error, dist.DistBackendError) or not text.startswith("NCCL error in: ") or is_lost_peer(error):
        return None
    # torch prints the file, the kind of error and the version first; without a last error all of it is the reason.
    return None if full_memory(error) or gpu_error(error) else text.rpartition("Last error:")[2].strip() or text


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a message or a collective failed because another rank is gone.

    torch's own errors are RuntimeErrors too, and NCCL reports errors of this rank's GPU among those of the network.
    """
    if full_memory(error) or gpu_error(error):
        return False
    if isinstance(error, dist.DistBackendError):
        return _REMOTE.search(str(error)) is not None
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _cuda(error: BaseException) -> str | None:
    """Return the reason in an error of CUDA, from whichever library; None for any other error."""
    if not isinstance(error, RuntimeError):
        return None
    if found := _CUDA.search(str(error)):
        return found[1]
    return str(error).partition("\n")[0] if isinstance(error, torch.AcceleratorError) else None
