"""Count of the Triton kernels that this process makes ready, by Triton's own hook."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Self

import torch

log = logging.getLogger(__name__)


class Compilations:
    """Counter of kernels that Triton compiles, or loads from its cache, in this process, while it is entered.

    Both stop the host, and with it all ranks that wait for this one. Every kernel counts, also those of libraries.
    """

    def __init__(self) -> None:
        self.count = 0
        self._counts = torch.cuda.is_available()  # elsewhere nothing is compiled, and triton need not be loaded
        self._before: Callable[..., Any] | None = None

    def __enter__(self) -> Self:
        if self._counts:
            from triton import knobs

            self._before = knobs.runtime.jit_post_compile_hook
            knobs.runtime.jit_post_compile_hook = self._add
        return self

    def __exit__(self, *_: object) -> None:
        if self._counts:
            from triton import knobs

            knobs.runtime.jit_post_compile_hook = self._before

    def _add(self, **compiled: Any) -> Any:
        self.count += 1
        log.info("compiled %s", compiled["repr"])
        return self._before(**compiled) if self._before is not None else None
