"""How work is divided over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
