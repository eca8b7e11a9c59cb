"""Failures are told apart, whichever library reports them, and a transport blames a peer for its own only."""

from __future__ import annotations

import errno
import os

import pytest
import torch
import torch.distributed as dist
from longring.launch.errors import GO_ON_LATER, IO_ERROR, USER_ERROR
from longring.launch.ranks.rank import _ending
from longring.parallel.cp import transports
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import open_group
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.visible import Visibility
from longring.parallel.failures import PeerError, full_memory, gpu_error, is_lost_peer
from torch.testing._internal.distributed.fake_pg import FakeStore

NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.29.7\nncclUnhandledCudaError: "
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ..."),
    dist.DistBackendError(f"{NCCL}Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    MemoryError(),
]
GPU = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for `...' in ..."),
    dist.DistBackendError(f"{NCCL}Call to CUDA function failed.\nLast error:\nCuda failure 700 'an illegal memory'"),
    RuntimeError("Triton Error [CUDA]: misaligned address"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    torch.AcceleratorError("unspecified launch failure"),
    RuntimeError("CUDA driver error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
PEER = [
    dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error"),
    dist.DistNetworkError("Connection reset by peer"),
    RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5"),
]
OTHER = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    ValueError("CUDA error: a word"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage\nDuplicate GPU detected : rank 0"),
    dist.DistBackendError("NCCL error in: x.cpp:1, unhandled system error\nError: /dev/shm: No space left on device"),
]


@pytest.mark.parametrize("error", [*FULL, *GPU, *PEER, *OTHER], ids=lambda error: repr(error)[:60])
def test_each_failure_is_one_kind(error):
    found = (bool(full_memory(error)), bool(gpu_error(error)), is_lost_peer(error))
    assert found == (error in FULL, error in GPU, error in PEER)


LOCAL = [
    (OTHER[2], USER_ERROR, "Duplicate GPU detected : rank 0"),
    (OTHER[3], IO_ERROR, "/dev/shm: No space left on device"),
    (
        dist.DistBackendError(
            "NCCL error in: x.cpp:1, invalid argument (run with NCCL_DEBUG=WARN), NCCL version 2.29.7\n"
            "ncclInvalidArgument: Invalid value for an argument.\nLast error:\nInvalid config blocking attribute 7\n"
        ),
        USER_ERROR,
        "rank 3: NCCL fails on this rank: Invalid config blocking attribute 7; ",
    ),
]


@pytest.mark.parametrize(("error", "status", "reason"), LOCAL, ids=["usage", "system", "argument"])
def test_a_failure_of_nccl_on_one_rank_blames_no_other(error, status, reason):
    ending = _ending(error, 3)
    assert ending is not None
    assert (ending[0], ending[2]) == (status, False)
    assert reason in ending[1] and "other ranks" not in ending[1]


def test_a_store_that_another_rank_left_is_a_lost_rank():
    error = dist.DistBackendError("[3] is setting up NCCL communicator, but store->get('0') got error: Broken pipe")
    ending = _ending(error, 3)
    assert ending is not None
    assert ending[0] == GO_ON_LATER and "cannot reach the other ranks" in ending[1]


def test_a_cause_is_recognized():
    error = OSError("rank 3 cannot read its rows")
    error.__cause__ = GPU[0]
    assert gpu_error(error) == "an illegal memory access was encountered"
    assert full_memory(error) is None


class FailingWork:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def wait(self) -> None:
        raise self.error


@pytest.mark.parametrize("where", ["post", "wait"])
@pytest.mark.parametrize("error", [FULL[0], GPU[0], PEER[0], PEER[2], OTHER[0]], ids=lambda error: repr(error)[:60])
def test_a_transport_blames_a_peer_for_its_own_failures_only(monkeypatch, error, where):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        group = open_group(range(2), [CpGrid.ring(2)])
        spec = AttentionSpec(CpGrid.ring(2), tuple(zigzag(8, rank, 2) for rank in range(2)), Visibility())

        def failing(ops):
            if where == "post":
                raise error
            return [FailingWork(error)]

        monkeypatch.setattr(transports.dist, "batch_isend_irecv", failing)
        x = torch.ones(1, 4, 1, 8)
        with pytest.raises(RuntimeError) as raised:
            context_attention(x, x, x, spec, group)
        assert isinstance(raised.value, PeerError) == (error in PEER)
        assert error in (raised.value, raised.value.__cause__)
        if error in PEER:
            assert "rank 1 of the group is gone or does not answer; see the log of global rank 1" in str(raised.value)
    finally:
        dist.destroy_process_group()
