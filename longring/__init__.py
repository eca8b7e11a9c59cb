"""LongRing: parts of a trainer for long contexts, each usable from another trainer.

The names of `__all__` are the library; docs/api.md describes them and says how long each stays as it is. A name is
imported when it is first used, so that `import longring` takes milliseconds and needs neither torch nor a GPU. Modules
below (`longring.parallel` and so on) may change in any version.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.config import LoaderConfig
    from .data.curriculum_config import CurriculumConfig, RenewalConfig
    from .data.order.path import document_order
    from .data.prepare.decompose import Piece, decompose
    from .data.read.batch_order import BatchOrder, Stretch
    from .data.read.mix import bucket_order
    from .data.read.stateful_loader import Batch, StatefulLoader
    from .kernels.attention import attention
    from .kernels.layout import SeqLayout
    from .kernels.mask import Mask, make_mask
    from .launch.checkpoint.files import Checkpoint
    from .parallel.cp.choose import PricedGrid, Pricer, choose
    from .parallel.cp.cost import AttentionShape, Event, Price, Speed
    from .parallel.cp.fit import Fit
    from .parallel.cp.grid import CpGrid
    from .parallel.cp.group import CommunicatorOptions
    from .parallel.cp.plan import Message, RankPlan, Share, Step, Tile
    from .parallel.cp.probe import Probe, probe
    from .parallel.cp.schedules import Schedule
    from .parallel.cp.shared import ContextParallel, SharedSequence
    from .parallel.cp.topology import Fabric, Topology
    from .parallel.cp.visible import Visibility

__version__ = "0.2.0"

__all__ = [
    "AttentionShape",
    "Batch",
    "BatchOrder",
    "Checkpoint",
    "CommunicatorOptions",
    "ContextParallel",
    "CpGrid",
    "CurriculumConfig",
    "Event",
    "Fabric",
    "Fit",
    "LoaderConfig",
    "Mask",
    "Message",
    "Piece",
    "Price",
    "PricedGrid",
    "Pricer",
    "Probe",
    "RankPlan",
    "RenewalConfig",
    "Schedule",
    "SeqLayout",
    "Share",
    "SharedSequence",
    "Speed",
    "StatefulLoader",
    "Step",
    "Stretch",
    "Tile",
    "Topology",
    "Visibility",
    "__version__",
    "attention",
    "bucket_order",
    "choose",
    "decompose",
    "document_order",
    "make_mask",
    "probe",
]

_NAMES = {
    "data.config": ("LoaderConfig",),
    "data.curriculum_config": ("CurriculumConfig", "RenewalConfig"),
    "data.order.path": ("document_order",),
    "data.prepare.decompose": ("Piece", "decompose"),
    "data.read.batch_order": ("BatchOrder", "Stretch"),
    "data.read.mix": ("bucket_order",),
    "data.read.stateful_loader": ("Batch", "StatefulLoader"),
    "kernels.attention": ("attention",),
    "kernels.layout": ("SeqLayout",),
    "kernels.mask": ("Mask", "make_mask"),
    "launch.checkpoint.files": ("Checkpoint",),
    "parallel.cp.choose": ("PricedGrid", "Pricer", "choose"),
    "parallel.cp.cost": ("AttentionShape", "Event", "Price", "Speed"),
    "parallel.cp.fit": ("Fit",),
    "parallel.cp.grid": ("CpGrid",),
    "parallel.cp.group": ("CommunicatorOptions",),
    "parallel.cp.plan": ("Message", "RankPlan", "Share", "Step", "Tile"),
    "parallel.cp.probe": ("Probe", "probe"),
    "parallel.cp.schedules": ("Schedule",),
    "parallel.cp.shared": ("ContextParallel", "SharedSequence"),
    "parallel.cp.topology": ("Fabric", "Topology"),
    "parallel.cp.visible": ("Visibility",),
}
"""Names of each module, as they are imported above for type checkers."""
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'longring' has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    except ModuleNotFoundError as error:
        from .launch.extras import advice

        raise ImportError(f"longring.{name}: {advice(error) or error}") from error
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
