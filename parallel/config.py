"""Settings under [parallel]: how tensors, optimizer state and sequences are divided over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, get_args

from annotated_types import Interval

from .cp.grid import NAMED, CpGrid, Layout
from .cp.topology import PRESETS, PeerCopies

GPU_QUEUES = 32
"""Number of queues of a GPU without tensor parallelism, the most that CUDA offers."""


@dataclass(frozen=True, kw_only=True)
class CpConfig:
    """Context parallelism: how the ranks that share a sequence divide its attention.

    The choice changes speed and memory; results differ by rounding only. Raises ValueError for an unknown
    schedule or topology.
    """

    schedule: str = "auto"
    """The grid of every bucket that several ranks share. auto prices the family of grids on the topology and takes the
    cheapest for each layer kind; a name (ring, ring_both_ways, token_ring, ulysses, grid) or a grid in text form, such
    as "query=2, kv=2, kv_route=direct", is taken as it is."""
    schedule_of: dict[str, str] = field(default_factory=dict)
    """Exceptions to `schedule` by context-parallel degree, with the same values: {"8" = "ulysses"} is used by the
    buckets that 8 ranks share."""
    layout: Literal["auto", "zigzag", "balanced", "documents"] = "zigzag"
    """Division of a sequence of several documents that attention keeps apart: zigzag cuts it as if it were one
    document; balanced gives every rank equal work; documents keeps a document on one rank where it fits, or, over
    several nodes, on one node, whose ranks get equal work; auto takes the cheapest for each sequence, priced on the
    topology. A sequence of one document is always cut in zigzag."""
    topology: str = "probe"
    """Links between the ranks, for pricing grids. probe measures links and attention speed when a run starts; the
    presets nvswitch, full_mesh, pcie_pairs, infiniband and ethernet assume the links and the speed of H100 GPUs."""
    narrow_results: bool = True
    """Send partial results in the dtype of the activations; false sends them in fp32. Results that are summed along
    the route `round`, and lse, always travel in fp32, and all sums are fp32."""
    max_ctas: Literal[1, 2, 4, 8, 16, 32] = 8
    """Maximum number of thread blocks (CTAs) of a GPU that one message takes; NCCL only. Few leave the GPU to attention
    and take less memory. NCCL would take the next power of two for any other number."""
    high_priority: bool = True
    """Send messages on streams of high priority, before waiting thread blocks of attention; NCCL only."""
    peer_copies: PeerCopies = "auto"
    """Send messages by copies between the GPUs of a node, without NCCL. auto does so in rings whose ranks all reach
    each other's memory, without tensor parallelism; always does so on CPUs as well and refuses other rings; never uses
    NCCL or gloo alone."""
    guards: bool = True
    """Check on a small sequence, before the first step, that no loss depends on a later token or on another document,
    and that loss and gradient equal those of one rank."""

    def __post_init__(self) -> None:
        # A grid in text form is parsed here, so that a wrong recipe fails at once.
        for key, name in (("schedule", self.schedule), *((f"schedule_of.{n}", x) for n, x in self.schedule_of.items())):
            if name != "auto" and name not in NAMED:
                try:
                    CpGrid.parse(name)
                except ValueError as error:
                    raise ValueError(
                        f"parallel.cp.{key} = {name!r}: neither auto, {', '.join(NAMED)} nor a grid ({error}); use one "
                        "of these names or a grid such as 'query=2, kv=2'"
                    ) from error
        for ranks in self.schedule_of:
            # TOML's keys are text; `named_grid` looks them up by the text of a number.
            if not ranks.isdecimal():
                raise ValueError(
                    f"parallel.cp.schedule_of.{ranks} = {self.schedule_of[ranks]!r}: the key must be a number of "
                    "ranks; write it in digits"
                )
        if self.topology != "probe" and self.topology not in PRESETS:
            raise ValueError(
                f"parallel.cp.topology = {self.topology!r}: must be one of probe, {', '.join(PRESETS)}; "
                "name one of these"
            )

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts that sequences of several documents may have."""
        return get_args(Layout) if self.layout == "auto" else (self.layout,)

    def named_grid(self, size: int) -> CpGrid | None:
        """Return the configured grid for `size` ranks, or None for auto.

        Raises ValueError if the configured grid has another number of ranks.
        """
        name = self.schedule_of.get(str(size), self.schedule)
        if name == "auto":
            return None
        grid = NAMED[name](size) if name in NAMED else CpGrid.parse(name)
        # A named grid has any size; one in text form has the size that its numbers give.
        if grid.size != size:
            key = f"schedule_of.{size}" if str(size) in self.schedule_of else "schedule"
            raise ValueError(
                f"parallel.cp.{key} = {name!r}: is a grid of {grid.size} ranks, and a bucket is spread over {size}; "
                f"set parallel.cp.schedule_of.{size} to a grid of {size} ranks"
            )
        return grid


Elements = Annotated[int, Interval(ge=1, le=2**40)]


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """Settings of DeepSpeed's ZeRO, under DeepSpeed's own names; its documentation describes them at length."""

    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu keeps AdamW's moments and the fp32 weights in the memory of the host, where AdamW then runs; ZeRO 1 to 3."""
    offload_param: Literal["none", "cpu"] = "none"
    """cpu keeps this rank's part of the weights in the memory of the host; ZeRO 3."""
    overlap_comm: bool = True
    """Sum gradients over ranks while the backward computes others; ZeRO 1 to 3."""
    reduce_bucket_size: Elements = 2**25
    """Number of gradient elements that are summed over ranks at once, 128 MiB in fp32; ZeRO 1 to 3."""
    allgather_bucket_size: Elements = 500_000_000
    """Number of elements of updated weights that ranks send each other at once; ZeRO 1 and 2."""
    round_robin_gradients: bool = False
    """Divide gradients among the copies to the host of several ranks; ZeRO 1 and 2 with offload_optimizer."""
    stage3_prefetch_bucket_size: Elements = 50_000_000
    """Number of elements of weights that are gathered before they are needed; ZeRO 3."""
    stage3_param_persistence_threshold: Elements = 100_000
    """Parameters with fewer elements are not divided among ranks; ZeRO 3."""
    stage3_max_live_parameters: Elements = 1_000_000_000
    """Maximum number of elements of gathered weights at a time; ZeRO 3."""
    stage3_max_reuse_distance: Elements = 1_000_000_000
    """Weights that are needed again within this number of elements stay gathered; ZeRO 3."""
    sub_group_size: Elements = 1_000_000_000
    """Number of elements that the optimizer steps at a time; ZeRO 3."""
    zero_hpz_partition_size: Annotated[int, Interval(ge=1, le=2**16)] = 1
    """Number of ranks, those of a node, among which a second copy of the weights is divided, so that the backward
    gathers within them (ZeRO++, arXiv 2306.10209); ZeRO 3, without tensor parallelism."""
    zero_quantized_weights: bool = False
    """Gather weights in 8 bits (ZeRO++); ZeRO 3, on GPUs."""
    zero_quantized_gradients: bool = False
    """Sum gradients over ranks in 4 bits (ZeRO++); ZeRO 3, on GPUs."""

    def check(self, stage: int) -> None:
        """Raise ValueError for a setting that has no effect in a ZeRO stage."""
        for setting in fields(self):
            stages = _STAGES.get(setting.name, (3,))
            value = getattr(self, setting.name)
            if value != setting.default and stage not in stages:
                raise ValueError(
                    f"parallel.zero.{setting.name} = {value!r}: has no effect with parallel.zero_stage = {stage}; "
                    f"remove it, or set parallel.zero_stage to {' or '.join(map(str, stages))}"
                )


_STAGES = {
    **dict.fromkeys(("offload_optimizer", "overlap_comm", "reduce_bucket_size"), (1, 2, 3)),
    **dict.fromkeys(("allgather_bucket_size", "round_robin_gradients"), (1, 2)),
}
"""Stages in which a setting of ZeRO has an effect; those that are not here: 3 alone."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism. The context-parallel degree is not set: it is the sequence length / tokens_per_rank.

    Raises ValueError for a tokens_per_rank that is no power of two, for sequence parallelism over one tensor-parallel
    rank or over a number of them that does not divide tokens_per_rank, and for a second copy of the weights with tensor
    parallelism.
    """

    tokens_per_rank: Annotated[int, Interval(ge=1, le=2**30)]
    """Tokens that a data-parallel rank takes in one micro-batch, a power of two. A micro-batch of a shorter bucket
    holds several sequences; a sequence of a longer bucket is shared by length / tokens_per_rank ranks."""
    tensor: Annotated[int, Interval(ge=1, le=2**16)] = 1
    """Number of ranks that share every weight matrix (Megatron's tensor parallelism); 1 switches it off."""
    sequence_parallel: bool = False
    """Divide the activations outside the tensor-parallel layers by tokens as well; requires tensor > 1."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed's ZeRO stage: 0 partitions nothing over the data-parallel ranks, 1 the optimizer state, 2 also the
    gradients, 3 also the weights."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    cp: CpConfig = field(default_factory=CpConfig)

    def __post_init__(self) -> None:
        self.zero.check(self.zero_stage)
        # A power of two has one bit set. Bucket lengths are powers of two as well, so every ratio of the two is whole.
        if self.tokens_per_rank & (self.tokens_per_rank - 1):
            below = 1 << self.tokens_per_rank.bit_length() - 1
            raise ValueError(
                f"parallel.tokens_per_rank = {self.tokens_per_rank}: must be a power of two; set it to {below}"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "parallel.sequence_parallel = true: needs tensor-parallel ranks, and parallel.tensor = 1; "
                "raise it or set sequence_parallel = false"
            )
        # Each tensor-parallel rank takes an equal part of a rank's tokens.
        if self.sequence_parallel and self.tokens_per_rank % self.tensor:
            raise ValueError(
                f"parallel.tokens_per_rank = {self.tokens_per_rank}: is not a multiple of parallel.tensor = "
                f"{self.tensor}; choose a power of two for it or set sequence_parallel = false"
            )

        # DeepSpeed divides the copy among adjacent ranks of the world, here those of one tensor-parallel group.
        if (copied := self.zero.zero_hpz_partition_size) > 1 and self.tensor > 1:
            raise ValueError(
                f"parallel.zero.zero_hpz_partition_size = {copied}: divides weights among adjacent ranks, which "
                f"parallel.tensor = {self.tensor} gives other weights; remove it, or set parallel.tensor = 1"
            )

    def context_parallel(self, sequence_tokens: int) -> int:
        """Return the context-parallel degree of a sequence length: 1 for a sequence that fits a rank."""
        return max(1, sequence_tokens // self.tokens_per_rank)

    def sequences_per_replica(self, sequence_tokens: int) -> int:
        """Return the number of sequences of this length in a micro-batch of one replica."""
        return max(1, self.tokens_per_rank // sequence_tokens)

    @property
    def gpu_queues(self) -> int:
        """Number of queues of a GPU (CUDA_DEVICE_MAX_CONNECTIONS); streams that share one wait for each other."""
        # Computation, ZeRO and each channel of a ring should have their own. But megatron-core lays a message of tensor
        # parallelism over a product, and only a single queue, which keeps the host's order, starts the message before
        # the product that fills the GPU.
        return 1 if self.tensor > 1 else GPU_QUEUES

    def data_size(self, world_size: int) -> int:
        """Return the number of ranks that hold equal weights: DeepSpeed's data-parallel ranks.

        Raises ValueError if parallel.tensor does not divide `world_size`.
        """
        if world_size % self.tensor:
            raise ValueError(
                f"parallel.tensor = {self.tensor}: does not divide a world of {world_size} ranks; "
                f"start a multiple of {self.tensor} ranks"
            )
        return world_size // self.tensor
