"""The backends of attention: implementations of one function, and the choice between them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import version
from itertools import takewhile
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from . import cudnn_flex, flash_3, flash_4, reference, torch_attention, torch_flash, varlen
from .case import Case, Kind, Task, unfit_nvidia
from .mask import Mask
from .packages import release
from .varlen import kind_of

log = logging.getLogger(__name__)

KINDS: tuple[Kind, ...] = get_args(Kind)
TASKS: tuple[Task, ...] = get_args(Task)


class Backend(NamedTuple):
    """One implementation of attention; both functions have the signatures of their namesakes in `reference`."""

    unfit: Callable[[Case], str | None]
    """Return the reason why the backend cannot compute a case, or None if it can."""
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., None]
    kinds: tuple[Kind, ...] = KINDS
    """The kinds of tiles for which it is timed; it may be slow with others, or refuse them."""
    writes: Callable[[Mask], bool] = lambda mask: False
    """Whether `backward` writes gradients in 16 bit for a mask; it adds to those in fp32 in any case."""


def choose_backend(case: Case, backend: str = "auto") -> str:
    """Return the name of the backend for a case: `backend` itself, or with "auto" the first that fits.

    Raises ValueError if `backend` is unknown, or if it cannot compute these inputs. The choice of "auto" is logged
    once, with the reasons against the backends before it.
    """
    return _choose(case, backend)


@cache
def _choose(case: Case, backend: str) -> str:
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"attention backend = {backend!r}: must be one of auto, {', '.join(BACKENDS)}")
        if (reason := BACKENDS[backend].unfit(case)) is not None:
            raise ValueError(
                f"attention backend = {backend!r}: cannot compute {case} ({reason}); "
                'set backend = "auto" (in a recipe train.attention_backend)'
            )
        return backend
    # `reference` supports every case, so there is always a first one. Those after it are not asked: a package that
    # nobody has named is not imported.
    reasons = ((name, candidate.unfit(case)) for name, candidate in BACKENDS.items())
    passed_over = dict(takewhile(lambda found: found[1] is not None, reasons))
    chosen = list(BACKENDS)[len(passed_over)]
    why = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    log.info("attention of %s: %s%s", case, chosen, f" ({why})" if why else "")
    return chosen


class Selection(NamedTuple):
    """The backends of a run: one for each task and kind of tile in `chosen`, and `default` for all other tiles.

    Its text stands wherever the name of one backend may: "triton; forward causal: cudnn", for example.
    """

    default: str
    chosen: Mapping[tuple[Task, Kind], str]

    def __str__(self) -> str:
        parts = (f"{task} {kind}: {name}" for (task, kind), name in self.chosen.items() if name != self.default)
        return "; ".join([self.default, *parts])

    @staticmethod
    @cache
    def parse(text: str) -> Selection:
        """Return the selection that a text describes; a text that is a single name, or "auto", gives the default alone.

        Raises ValueError for an unknown task, kind or backend, and for a task and kind that have two backends.
        """
        default, *parts = text.split("; ")
        chosen = {}
        for part in parts:
            tile, _, name = part.partition(": ")
            task, _, kind = tile.partition(" ")
            if task not in TASKS or kind not in KINDS or name not in BACKENDS or (task, kind) in chosen:
                raise ValueError(
                    f"attention backend = {text!r}: {part!r} names no backend of a kind of tile, or a second"
                )
            chosen[task, kind] = name
        return Selection(default, chosen)

    def name_of(self, task: Task, kind: Kind) -> str:
        """Return the name of the backend of a task and kind of tile."""
        return self.chosen.get((task, kind), self.default)

    def of_tile(self, case: Case, task: Task, mask: Mask) -> str:
        """Return the name of the backend that computes a tile.

        A selection is measured with all heads of a rank. Context parallelism may leave fewer; where the chosen backend
        cannot compute those, the default does.
        """
        name = self.name_of(task, kind_of(mask)) if self.chosen else self.default
        return name if name == self.default or _fits(case, name) else self.default


@cache
def _fits(case: Case, name: str) -> bool:
    return BACKENDS[name].unfit(case) is None


def _unfit_cpu(case: Case) -> str | None:
    if case.device != "cpu":
        return "runs on the CPU"
    return "no softcap" if case.softcap else None


def _unfit_triton(case: Case) -> str | None:
    if case.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "runs on CUDA, elsewhere with TRITON_INTERPRET=1"
    if case.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "bfloat16, float16 and float32 only"
    if case.head_dim > 256 or case.head_dim % 8:
        return "head dims up to 256, multiples of 8"
    return None


def _unfit_cudnn(case: Case) -> str | None:
    if (reason := unfit_nvidia(case, least=80, largest_head_dim=128)) is not None:
        return reason
    if case.deterministic:
        return "its backward has no fixed order of sums in torch (github.com/pytorch/pytorch/pull/182551)"
    if case.arch.startswith("sm_10") and case.num_kv_heads < 8 and release(torch.__version__) >= (2, 11):
        return "wrong results with fewer than 8 kv heads on sm_100 (github.com/pytorch/pytorch/issues/193893)"
    return None


def _triton_forward(*arguments) -> tuple[Tensor, Tensor]:
    from . import triton_attention  # imported late: a machine without a GPU need not load triton

    return triton_attention.forward(*arguments)


def _unfit_gluon(case: Case) -> str | None:
    if (reason := unfit_nvidia(case, least=90, largest_head_dim=128)) is not None:
        return reason
    if case.arch != "sm_90":
        return f"runs on sm_90, not on {case.arch}"
    if case.head_dim <= 32:
        return "head dims above 32"
    found = version("triton")
    if release(found) < (3, 7):
        return f"needs triton 3.7 or later, not {found}"
    return None


def _gluon_forward(*arguments) -> tuple[Tensor, Tensor]:
    from . import triton_attention

    return triton_attention.forward_by_gluon(*arguments)


def _triton_backward(*arguments) -> None:
    from . import triton_attention

    triton_attention.backward(*arguments)


def _gluon_backward(*arguments) -> None:
    from . import triton_attention

    triton_attention.backward_by_gluon(*arguments)


def _of_operator(
    unfit: Callable[[Case], str | None], operator: torch_attention.Operator, kinds: tuple[Kind, ...]
) -> Backend:
    return Backend(
        unfit, partial(torch_attention.forward, operator), partial(torch_attention.backward, operator), kinds
    )


def _of_kernel(unfit: Callable[[Case], str | None], kernel: varlen.Kernel) -> Backend:
    both = partial(varlen.forward, kernel), partial(varlen.backward, kernel)
    return Backend(unfit, *both, writes=varlen.is_one_call)


BACKENDS = {
    "torch_cpu": _of_operator(_unfit_cpu, torch_attention.CPU, KINDS),
    "triton": Backend(_unfit_triton, _triton_forward, _triton_backward, writes=lambda mask: True),
    # Documents would be many small calls, and a window is none of its masks.
    "cudnn": _of_operator(_unfit_cudnn, torch_attention.CUDNN, ("whole", "causal")),
    "flash": _of_kernel(torch_flash.unfit, torch_flash.KERNEL),
    "flash_3": _of_kernel(flash_3.unfit, flash_3.KERNEL),
    "flash_4": _of_kernel(flash_4.unfit, flash_4.KERNEL),
    "cudnn_flex": Backend(cudnn_flex.unfit, cudnn_flex.forward, cudnn_flex.backward, writes=lambda mask: True),
    "gluon": Backend(_unfit_gluon, _gluon_forward, _gluon_backward, writes=lambda mask: True),
    "reference": Backend(lambda case: None, reference.forward, reference.backward),
}
"""The backends in order of preference. On CUDA "auto" takes `triton`; those after it run when they are named, or when
`choose.measure` has found them faster for a kind of tile. Only `triton` and `gluon` extend a running result in
one pass."""
