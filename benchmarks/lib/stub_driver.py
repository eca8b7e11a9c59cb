"""A Triton driver without a device: kernels are compiled for an architecture, and a launch does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.runtime._allocation import _allocator


class StubLauncher:
    """Launcher that allocates what a launch allocates and starts nothing."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.scratch_bytes, self.align = metadata.global_scratch_size, metadata.global_scratch_align

    def __call__(self, x: int, y: int, z: int, stream: int, *_: Any) -> None:
        """Allocate the scratch memory of `x * y * z` programs."""
        if self.scratch_bytes:
            _allocator.get()(x * y * z * self.scratch_bytes, self.align, stream)


class StubDriver(CudaDriver):
    """The CUDA driver of one device of compute capability `capability`, e.g. 90."""

    def __init__(self, capability: int) -> None:  # the class above would load libcuda
        self.capability = capability
        self.launcher_cls = StubLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**31},
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        """Return the architecture for which kernels are compiled."""
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def stub_driver(arch: str) -> Iterator[None]:
    """Take launches for the architecture `arch`, e.g. "sm_90", as long as the context is open."""
    before = driver._active
    driver.set_active(StubDriver(int(arch.removeprefix("sm_"))))
    try:
        yield
    finally:
        driver._active = before
