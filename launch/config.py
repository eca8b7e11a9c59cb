"""The recipe: every column's configuration in one frozen tree, from defaults < TOML file < `train.steps=20`."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.config import CurriculumConfig, DataConfig, LoaderConfig
from ..data.order_config import KnotsConfig, OrderConfig
from ..model.config import ModelConfig
from ..parallel.config import ParallelConfig
from .settings import apply_overrides, from_tree


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast and how exactly to train."""

    steps: int
    """Optimizer steps of the whole run; the curriculum and the learning rate are laid over them."""
    global_batch_tokens: int
    """Tokens of every optimizer step, over all ranks and accumulation steps; the same whatever the world."""
    learning_rate: float
    """Peak, reached after warm-up."""
    min_learning_rate: float = 0.0
    """Where the cosine ends, at the last step."""
    warmup_steps: int = 0
    """Linear rise from 0. 0: start at the peak."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay, on matrices; norm weights have none."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm. 0: no clipping."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and activations; bfloat16 keeps fp32 master weights in the optimizer."""
    attention_backend: Literal["auto", "torch_cpu", "triton", "cudnn", "flash", "reference"] = "auto"
    """What computes attention; auto takes the first fit for the device, dtype and head dim, and logs why."""
    recompute: bool = False
    """Compute activations again in the backward instead of keeping them; attention alone is kept, and sends nothing
    twice."""
    seed: int = 0
    """Decides initial weights and the order of sequences."""
    checkpoint_every_steps: int = 1000
    """Save after every so many steps; the last step is always saved, and the one at which a signal stops the run."""
    keep_checkpoints: int = 3
    """Of the checkpoints saved, the last so many stay."""
    keep_checkpoint_every_steps: int = 0
    """Of the older ones, those of steps that are multiples of this stay too. 0: none."""
    deterministic: bool = False
    """Use only operations that give the same bits each time on the same machines, and choose grids without measuring;
    see docs/faults.md for the cost."""
    ranks_per_node: int = 0
    """Processes that `longring train` starts here. 0: one for each GPU, or one on a machine without."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_tokens", "checkpoint_every_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} = {getattr(self, name)}: must be at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"train.warmup_steps = {self.warmup_steps} must lie in [0, train.steps = {self.steps})")
        if not 0 <= self.min_learning_rate <= self.learning_rate or self.learning_rate == 0:
            raise ValueError(
                f"train.min_learning_rate = {self.min_learning_rate} must lie in "
                f"[0, train.learning_rate = {self.learning_rate}], and that above 0"
            )
        for name in ("clip_grad_norm", "weight_decay", "seed", "ranks_per_node", "keep_checkpoint_every_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} = {getattr(self, name)}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """What a run does when something goes wrong."""

    max_nonfinite_steps: int = 10
    """A step whose gradients are not finite changes nothing, on any rank. So many in a row stop the run."""
    spike_deviations: float = 0.0
    """A loss this many standard deviations above the mean of the last spike_window_steps is a spike: the run goes back
    to the last checkpoint before it and leaves its batches out. 0: never."""
    spike_window_steps: int = 100
    """Losses that a spike is told by."""
    spike_skip_steps: int = 1
    """Batches left out after a spike: the spike's, and those before it."""
    max_rewinds: int = 3
    """So many spikes in one start are answered; the next one stops the run."""
    max_failed_saves: int = 3
    """A save that fails, on a full disk for example, is tried again at the next checkpoint; so many in a row stop the
    run."""
    hang_minutes: float = 10.0
    """Without progress for so long a rank says where it is and ends, and the run with it. 0: never."""

    def __post_init__(self) -> None:
        for name in ("max_nonfinite_steps", "spike_skip_steps", "max_failed_saves"):
            if getattr(self, name) < 1:
                raise ValueError(f"faults.{name} = {getattr(self, name)}: must be at least 1")
        if self.spike_window_steps < 2:
            raise ValueError(f"faults.spike_window_steps = {self.spike_window_steps}: must be at least 2")
        for name in ("spike_deviations", "max_rewinds", "hang_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"faults.{name} = {getattr(self, name)}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `longring evaluate` reads of the held-out documents."""

    max_tokens_per_bucket: int = 2**20
    """At most so many tokens of each bucket, from its start; the rest of a larger held-out set is not read."""
    knots: bool = False
    """Whether held-out sequences are tied as `knots` says, its share of them; the loss then leaves out the marks."""

    def __post_init__(self) -> None:
        if self.max_tokens_per_bucket < 1:
            raise ValueError(f"evaluate.max_tokens_per_bucket = {self.max_tokens_per_bucket}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What `longring submit` asks of Slurm."""

    ranks_per_node: int = 8
    """GPUs of a node, each with one rank."""
    cpu: bool = False
    """Ask for no GPUs: the ranks train on the CPUs, over gloo."""
    time: str = "24:00:00"
    """Limit of one start; a run takes as many as it needs."""
    save_seconds: int = 300
    """So long before the limit the ranks are told to save and leave."""
    partition: str = ""
    account: str = ""
    job_name: str = ""
    """Empty: the run directory's name."""
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    """Further options of sbatch by name, without dashes; an empty value takes the script's own away."""
    max_fruitless_starts: int = 3
    """A job that ends requeues itself, unless it has done so this many times since the last new checkpoint."""
    min_free_memory_gb: float = 1.0
    """Free on a node for each rank before it starts."""
    min_free_disk_gb: float = 1.0
    """Free in the run directory before a start; twice the last checkpoint's size where that is more."""
    min_rdma_ports: int = 0
    """InfiniBand or RoCE ports that must be active on a node. 0: one, where there are any."""

    def __post_init__(self) -> None:
        for name in ("ranks_per_node", "save_seconds", "max_fruitless_starts"):
            if getattr(self, name) < 1:
                raise ValueError(f"slurm.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("min_free_memory_gb", "min_free_disk_gb", "min_rdma_ports"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"slurm.{name} = {getattr(self, name)}: must not be negative")
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise ValueError(f"slurm.time = {self.time!r}: must look like 24:00:00 or 7-00:00:00")
        texts = {"partition": self.partition, "account": self.account, "job_name": self.job_name, **self.options}
        for name, value in texts.items():
            if not re.fullmatch(r"[\w.,:@%+/=\[\]*&|()-]*", value) or not re.fullmatch(r"[a-z_-]+", name):
                raise ValueError(f"slurm.{name} = {value!r}: no option of sbatch, which has no spaces or quotes")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete run."""

    run_directory: str
    """Where the run writes: resolved recipe, metrics, logs, checkpoints, report."""
    data: DataConfig
    order: OrderConfig
    knots: KnotsConfig
    curriculum: CurriculumConfig
    loader: LoaderConfig
    model: ModelConfig
    parallel: ParallelConfig
    train: TrainConfig
    faults: FaultsConfig
    slurm: SlurmConfig
    evaluate: EvaluateConfig

    def __post_init__(self) -> None:
        self.order.check(self.data)
        self.knots.check(self.data)
        if self.train.global_batch_tokens % self.data.max_bucket_tokens:
            raise ValueError(
                f"train.global_batch_tokens = {self.train.global_batch_tokens} is not a multiple of "
                f"data.max_bucket_tokens = {self.data.max_bucket_tokens}: a global batch holds whole sequences"
            )
        for name, heads in (("num_heads", self.model.num_heads), ("num_kv_heads", self.model.num_kv_heads)):
            if heads % self.parallel.tensor:
                raise ValueError(
                    f"parallel.tensor = {self.parallel.tensor} does not divide model.{name} = {heads}: "
                    "tensor parallelism gives each rank whole heads"
                )
        if self.model.ffn_hidden_size % self.parallel.tensor:
            raise ValueError(
                f"parallel.tensor = {self.parallel.tensor} does not divide "
                f"model.ffn_hidden_size = {self.model.ffn_hidden_size}"
            )
        if self.parallel.sequence_parallel and self.data.min_bucket_tokens % self.parallel.tensor:
            raise ValueError(
                f"data.min_bucket_tokens = {self.data.min_bucket_tokens} is not a multiple of parallel.tensor = "
                f"{self.parallel.tensor}, by which sequence_parallel divides every sequence"
            )

    @property
    def training_directory(self) -> str:
        """The prepared data that is trained on: as prepared, or as ordered."""
        return self.order.directory or self.data.directory

    @property
    def max_context_parallel(self) -> int:
        """Ranks that share a sequence of the largest bucket."""
        return self.parallel.context_parallel(self.data.max_bucket_tokens)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-steps of one optimizer step on `world_size` ranks.

        Raises ValueError when the world cannot be divided so, before any process group is joined.
        """
        data_size = self.parallel.data_size(world_size)
        if data_size % self.max_context_parallel:
            needed = self.max_context_parallel * self.parallel.tensor
            raise ValueError(
                f"a world of {world_size} ranks cannot hold data.max_bucket_tokens = {self.data.max_bucket_tokens} "
                f"at parallel.tokens_per_rank = {self.parallel.tokens_per_rank}: start a multiple of {needed} ranks, "
                "or raise tokens_per_rank"
            )
        micro_batch_tokens = data_size * self.parallel.tokens_per_rank
        if self.train.global_batch_tokens % micro_batch_tokens:
            raise ValueError(
                f"train.global_batch_tokens = {self.train.global_batch_tokens} is not a multiple of the "
                f"{micro_batch_tokens} tokens that {world_size} ranks take at once ({data_size} data-parallel x "
                f"{self.parallel.tokens_per_rank} parallel.tokens_per_rank)"
            )
        return self.train.global_batch_tokens // micro_batch_tokens


def load_recipe(file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply overrides like `train.steps=20`. Raises ValueError naming the key."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"recipe {path} does not exist")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not valid TOML: {error}") from error
    apply_overrides(tree, overrides)
    return from_tree(Recipe, tree, source=str(path))
