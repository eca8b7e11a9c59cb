"""How work is divided over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .cp.grid import NAMED, CpGrid
from .cp.topology import PRESETS


@dataclass(frozen=True, kw_only=True)
class CpConfig:
    """How the ranks that share a sequence divide its attention. Results differ by rounding only."""

    schedule: str = "auto"
    """auto: price the whole family on the topology and take the best for each bucket and kind of layer; or ring,
    ring_both_ways, token_ring, ulysses, grid; or a grid by hand, "query=2, kv=2, kv_route=direct"."""
    schedule_of: dict[str, str] = field(default_factory=dict)
    """The same for a number of ranks: {"8" = "ulysses"}; other numbers go by `schedule`."""
    topology: str = "probe"
    """What joins the ranks: probe (measured when a run starts), or nvswitch, full_mesh, pcie_pairs, infiniband,
    ethernet, whose ranks are taken for H100s."""
    narrow_results: bool = True
    """Partial results that go straight home travel in the activations' dtype; false: in fp32."""
    timeout_s: float = 600.0
    """How long a rank waits for a message before it calls its peer dead."""
    guards: bool = True
    """Before the first step, check on a small sequence that nothing sees a later token or another document, and that
    loss and gradient are those of one rank."""

    def __post_init__(self) -> None:
        for key, name in (("schedule", self.schedule), *((f"schedule_of.{n}", x) for n, x in self.schedule_of.items())):
            if name != "auto" and name not in NAMED:
                try:
                    CpGrid.parse(name)
                except ValueError as error:
                    raise ValueError(
                        f"parallel.cp.{key} = {name!r} is not auto, {', '.join(NAMED)}, and no grid: {error}"
                    ) from error
        for ranks in self.schedule_of:
            if not ranks.isdecimal():
                raise ValueError(f"parallel.cp.schedule_of.{ranks}: the key must be a number of ranks")
        if self.topology != "probe" and self.topology not in PRESETS:
            raise ValueError(f"parallel.cp.topology = {self.topology!r} must be probe, {', '.join(PRESETS)}")
        if self.timeout_s <= 0:
            raise ValueError(f"parallel.cp.timeout_s = {self.timeout_s}: must be above 0")

    def named_grid(self, size: int) -> CpGrid | None:
        """The grid that the configuration names for so many ranks; None: auto. Raises ValueError for a misfit."""
        name = self.schedule_of.get(str(size), self.schedule)
        if name == "auto":
            return None
        grid = NAMED[name](size) if name in NAMED else CpGrid.parse(name)
        if grid.size != size:
            raise ValueError(
                f"parallel.cp: {name!r} is a grid of {grid.size} ranks, and a bucket is spread over {size}: "
                f"name one for it in parallel.cp.schedule_of.{size}"
            )
        return grid


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism. Context parallelism is absent: it follows from a batch's length and tokens_per_rank."""

    tokens_per_rank: int
    """Tokens of a micro-batch on every model replica, a power of two: shorter buckets put several sequences there,
    longer ones spread each sequence over bucket / tokens_per_rank ranks."""
    tensor: int = 1
    """Ranks that share every weight matrix (Megatron's tensor parallelism); 1: none."""
    sequence_parallel: bool = False
    """Divide activations between the tensor-parallel regions by tokens too; needs tensor > 1."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed partitions over the data-parallel ranks: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights."""
    cp: CpConfig = field(default_factory=CpConfig)

    def __post_init__(self) -> None:
        if self.tokens_per_rank < 1 or self.tokens_per_rank & (self.tokens_per_rank - 1):
            raise ValueError(f"parallel.tokens_per_rank = {self.tokens_per_rank}: must be a power of two")
        if self.tensor < 1:
            raise ValueError(f"parallel.tensor = {self.tensor}: must be at least 1")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("parallel.sequence_parallel = true divides work among tensor-parallel ranks, "
                             "but parallel.tensor = 1: raise it or set sequence_parallel = false")  # fmt: skip
        if self.sequence_parallel and self.tokens_per_rank % self.tensor:
            raise ValueError(
                f"parallel.tokens_per_rank = {self.tokens_per_rank} is not a multiple of "
                f"parallel.tensor = {self.tensor}, which sequence_parallel divides it by"
            )

    def context_parallel(self, sequence_tokens: int) -> int:
        """Ranks that share a sequence of this length; 1 for all that fit a rank."""
        return max(1, sequence_tokens // self.tokens_per_rank)

    def sequences_per_replica(self, sequence_tokens: int) -> int:
        """Sequences of this length in a micro-batch of one replica (the ranks of one context-parallel group)."""
        return max(1, self.tokens_per_rank // sequence_tokens)

    def data_size(self, world_size: int) -> int:
        """Ranks that share a tensor-parallel slice: what the optimizer sees as data-parallel ranks.

        Raises ValueError when parallel.tensor does not divide the world.
        """
        if world_size % self.tensor:
            raise ValueError(f"a world of {world_size} ranks cannot be divided by parallel.tensor = {self.tensor}")
        return world_size // self.tensor
