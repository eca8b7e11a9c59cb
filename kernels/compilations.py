"""Count of the Triton kernels that this process makes ready, by Triton's own hook."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)


class Compilations:
    """Counter of kernels that Triton compiles, or loads from its cache, in this process until `close`.

    Both stop the host, and with it all ranks that wait for this one. Every kernel counts, also those of libraries.
    """

    def __init__(self) -> None:
        self.count = 0
        self._counts = torch.cuda.is_available()  # elsewhere nothing is compiled, and triton need not be loaded
        if self._counts:
            from triton import knobs

            self._before: Callable[..., Any] | None = knobs.runtime.jit_post_compile_hook
            knobs.runtime.jit_post_compile_hook = self._add

    def close(self) -> None:
        """Count no more, and give Triton the hook back that it had before."""
        if self._counts:
            from triton import knobs

            knobs.runtime.jit_post_compile_hook = self._before

    def _add(self, **compiled: Any) -> Any:
        self.count += 1
        log.info("compiled %s", compiled["repr"])
        return self._before(**compiled) if self._before is not None else None
