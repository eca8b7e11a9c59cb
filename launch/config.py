"""The recipe: the settings of a run in one frozen tree.

Defaults are replaced by the TOML file, and both by overrides such as `train.steps=20`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from ..data.config import DataConfig, LoaderConfig
from ..data.curriculum_config import CurriculumConfig, next_divisor
from ..data.order_config import KnotsConfig, OrderConfig
from ..model.config import MemoryConfig, ModelConfig
from ..parallel.config import ParallelConfig
from .settings import apply_overrides, from_tree, read_toml
from .trackers import TrackConfig

MAX_STEPS = 99_999_999
"""Most steps of a run: names of checkpoints have eight digits."""
Steps = Annotated[int, Interval(ge=1, le=MAX_STEPS)]
StepsOrNone = Annotated[int, Interval(ge=0, le=MAX_STEPS)]
Rate = Annotated[float, Interval(ge=0, le=1e3)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Gigabytes = Annotated[float, Interval(ge=0, le=1e9)]
_OPTIONS = """
begin clusters comment constraint contiguous core-spec cpus-per-gpu cpus-per-task deadline dependency distribution
exclude exclusive gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres hint hold licenses mail-type
mail-user mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice nodefile nodelist no-requeue ntasks ntasks-per-core
ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode oversubscribe power prefer priority qos quiet requeue
reservation segment signal sockets-per-node spread-job switches thread-spec threads-per-core time-min tmp wckey
"""
SBATCH_OPTIONS = frozenset(_OPTIONS.split())
"""Options that a recipe may set: none of them names a file to write, a program, a container or a variable."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Origin of a run's weights before its first step."""

    from_: str = ""
    """Directory of a run, of one of its checkpoints or of a Hugging Face model, key `from`. Its weights begin this run,
    which may have other data, lengths, RoPE, rates and ranks; of a run, it is the last checkpoint. Empty: random
    weights."""
    moments: bool = False
    """Take AdamW's moments and their number of updates from there as well."""

    def __post_init__(self) -> None:
        if self.moments and not self.from_:
            raise ValueError("init.moments = True: needs init.from; name a run or a checkpoint, or set it to false")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimization: steps, batch, learning rate, precision, and when to save."""

    steps: Steps
    """Optimizer steps of the whole run. The curriculum and the learning rate span exactly these steps."""
    global_batch_tokens: Annotated[int, Interval(ge=1, le=2**34)]
    """Tokens of one optimizer step, over all ranks and micro-batches. The same for every number of ranks."""
    learning_rate: Annotated[float, Interval(gt=0, le=1e3)]
    """Peak learning rate, reached after warm-up."""
    initial_learning_rate: Rate = 0.0
    """Learning rate from which warm-up rises; above 0 for a model that comes with weights."""
    warmup_steps: StepsOrNone = 0
    """Number of first steps in which the learning rate rises linearly. 0: start at the peak."""
    cooldown_steps: StepsOrNone = 0
    """Number of steps after warm-up in which the learning rate falls from the peak to constant_learning_rate."""
    constant_learning_rate: Rate = 0.0
    """Learning rate between cool-down and decay. 0: the peak, without cool-down."""
    decay_steps: StepsOrNone = 0
    """Number of last steps in which the learning rate falls to min_learning_rate. 0: all after warm-up and cool-down.
    A run may be made longer, or shorter, until its decay begins."""
    decay: Literal["cosine", "linear", "sqrt", "exponential"] = "cosine"
    """Form of the decay; "sqrt" is 1 - sqrt(progress), and "exponential" ends above 0 only."""
    min_learning_rate: Rate = 0.0
    """Learning rate of the last step, where the decay ends."""
    weight_decay: Rate = 0.1
    """Decoupled weight decay of AdamW. It applies to matrices, not to norm weights."""
    beta1: Decay = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: Decay = 0.95
    """Decay rate of AdamW's second moment."""
    clip_grad_norm: Annotated[float, Interval(ge=0, le=1e9)] = 1.0
    """Maximum norm of the gradient over all parameters; larger gradients are scaled down. 0: no clipping."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of weights and activations. With bfloat16 the optimizer keeps fp32 master weights."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which gradients are summed over micro-batches and ranks. bfloat16 takes half the memory and traffic
    of that sum, and its error grows with their number; docs/design.md has figures."""
    attention_backend: Literal[
        "auto", "torch_cpu", "triton", "cudnn", "flash", "flash_3", "flash_4", "cudnn_flex", "gluon", "reference"
    ] = "auto"
    """Attention kernel. On GPUs "auto" takes, for each kind of tile, the fastest of those installed, which a start
    measures; elsewhere, and with `deterministic`, the first that fits the device, dtype and head dim, and logs why."""
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    """Seed of the initial weights and of the order of sequences."""
    checkpoint_every_steps: Steps = 1000
    """Number of steps between checkpoints. The last step is always saved, and so is the step at which a signal stops
    the run."""
    keep_checkpoints: Steps = 3
    """Number of most recent checkpoints to keep."""
    keep_checkpoint_every_steps: StepsOrNone = 0
    """Keep older checkpoints too if their step is a multiple of this number. 0: keep none of them."""
    evaluate_every_steps: StepsOrNone = 0
    """Number of steps between evaluations by the table `evaluate` on the ranks of the run. 0: none."""
    evaluate_seconds: Annotated[float, Interval(gt=0, le=604_800)] = 600.0
    """Seconds after which an evaluation during training ends; what it has not come to is left out."""
    deterministic: bool = False
    """Use only operations whose results are bitwise reproducible on the same machines, and choose grids and attention
    kernels without measuring. docs/faults.md has the cost."""
    gradient_norms_every_steps: StepsOrNone = 0
    """Number of steps between records of the gradient norm of each layer, the embedding, the last norm and the head. 0:
    never."""
    profile: str = ""
    """First and last step of a trace of torch's profiler, such as "120-124". Empty: none."""
    profile_ranks: tuple[Annotated[int, Interval(ge=0, lt=2**20)], ...] = (0,)
    """Ranks that write the trace, into logs/."""
    ranks_per_node: Annotated[int, Interval(ge=0, le=1024)] = 0
    """Number of ranks that `longring train` starts on this machine. 0: one for each GPU, or one without GPUs."""

    def __post_init__(self) -> None:
        if (self.cooldown_steps > 0) != (self.constant_learning_rate > 0):
            raise ValueError(
                f"train.cooldown_steps = {self.cooldown_steps} with train.constant_learning_rate = "
                f"{self.constant_learning_rate}: a cool-down needs both above 0; without one set both to 0"
            )
        first, last = self.profile_steps
        if self.profile and not 1 <= first <= last:
            raise ValueError(
                f"train.profile = {self.profile!r}: not a first and a last step; set it to a few steps such as "
                "'120-124', or leave it empty"
            )
        phases = self.warmup_steps + self.cooldown_steps + max(self.decay_steps, 1)
        if self.steps < phases:
            raise ValueError(
                f"train.steps = {self.steps}: below the {phases} steps that train.warmup_steps = {self.warmup_steps}, "
                f"train.cooldown_steps = {self.cooldown_steps} and train.decay_steps = {self.decay_steps} (at least 1) "
                "take; lower them, or raise train.steps"
            )
        constant = "constant_learning_rate" if self.constant_learning_rate else "learning_rate"
        for name, limit in (
            ("initial_learning_rate", "learning_rate"),
            ("constant_learning_rate", "learning_rate"),
            ("min_learning_rate", constant),
        ):
            if getattr(self, name) > getattr(self, limit):
                raise ValueError(
                    f"train.{name} = {getattr(self, name)}: must be at most train.{limit} = {getattr(self, limit)}; "
                    "lower it"
                )
        if self.decay == "exponential" and self.min_learning_rate == 0:
            raise ValueError(
                "train.decay = 'exponential' with train.min_learning_rate = 0.0: an exponential never ends at 0; raise "
                "train.min_learning_rate, or set train.decay = 'linear'"
            )
        if self.dtype == "float32" and self.gradient_dtype == "bfloat16":
            raise ValueError(
                f"train.gradient_dtype = {self.gradient_dtype!r}: is less exact than train.dtype = {self.dtype!r}; "
                f"set it to {self.dtype}"
            )

    @property
    def profile_steps(self) -> tuple[int, int]:
        """First and last step of the trace, 0 and 0 if there is none; the last is below the first if malformed."""
        found = re.fullmatch(r"(\d{1,8})-(\d{1,8})", self.profile, re.ASCII)
        return (int(found[1]), int(found[2])) if found else (0, 0)


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Responses of a run to non-finite gradients, loss spikes, failed saves and hangs."""

    max_nonfinite_steps: Steps = 10
    """Maximum number of consecutive steps with non-finite gradients; that many stop the run. Such a step changes no
    weights on any rank."""
    spike_deviations: Annotated[float, Interval(ge=0, le=1e6)] = 0.0
    """A loss this many standard deviations above the mean of the last spike_window_steps losses is a spike: the run
    returns to the last checkpoint before it and leaves out its batches. 0: no loss is a spike."""
    spike_window_steps: Annotated[int, Interval(ge=2, le=100_000)] = 100
    """Length of the spike window: number of last good steps from whose losses a spike is detected. Before there are as
    many, no loss is a spike."""
    spike_skip_steps: Steps = 1
    """Number of batches left out after a spike: the batch of the spike and the batches just before it."""
    max_rewinds: StepsOrNone = 3
    """Maximum number of rewinds per start; one more spike stops the run."""
    max_failed_saves: Steps = 3
    """Maximum number of consecutive failed saves, on a full disk for example; that many stop the run. Training goes on
    after a failed save until the next checkpoint is due."""
    hang_minutes: Annotated[float, Interval(ge=0, le=525_600)] = 10.0
    """Minutes without progress after which a rank reports its position and ends the run; more than a step takes. 0:
    never; torch then ends a collective after 10 minutes, and nothing ends a host that NCCL lets wait."""

    @property
    def collective_minutes(self) -> float:
        """Time limit of a collective. The watchdog tells more about a hang, so it comes first."""
        return max(10.0, 2 * self.hang_minutes)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out sequences that `longring evaluate` reads."""

    max_tokens_per_bucket: Annotated[int, Interval(ge=1, le=2**50)] = 2**20
    """Maximum number of tokens to read of each bucket, evenly over it."""
    knots: bool = False
    """Apply the training `knots` to held-out sequences as well; the marks are left out of the loss."""
    tasks: tuple[str, ...] = ()
    """Tasks to score at the length of every bucket, by name or by the beginning of names up to an underscore."""
    samples: Annotated[int, Interval(ge=1, le=100_000)] = 40
    """Number of samples of each task and length; 40 cover all depths of a needle."""
    distractors: Annotated[int, Interval(ge=0, le=3)] = 1
    """Number of wrong answers of each sample; each takes one more forward pass."""
    context_sequences: Annotated[int, Interval(ge=0, le=2**40)] = 0
    """Maximum number of held-out sequences of each bucket for the gain of context and LongPPL. 0: neither."""
    short_tokens: Annotated[int, Interval(ge=4, le=2**30)] = 4096
    """LongPPL: length of the short context."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Resources that `longring submit` requests, and conditions under which a job starts again."""

    ranks_per_node: Annotated[int, Interval(ge=1, le=1024)] = 8
    """Number of ranks on each node, one for each GPU."""
    cpu: bool = False
    """Request no GPUs: the ranks train on the CPUs, over gloo."""
    time: str = "24:00:00"
    """Time limit of one start. A run takes as many starts as it needs."""
    save_seconds: Annotated[int, Interval(ge=1, le=604_800)] = 300
    """Seconds before the time limit at which the ranks are told to save and stop."""
    partition: str = ""
    """Partition of the job. Empty: the cluster's default."""
    account: str = ""
    """Account that the job is charged to. Empty: the user's default."""
    job_name: str = ""
    """Name of the job. Empty: the name of the run directory."""
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    """Further sbatch options by name, without dashes: resources and scheduling. An empty value removes the script's
    default."""
    max_fruitless_starts: Annotated[int, Interval(ge=1, le=1_000_000)] = 3
    """Maximum number of consecutive requeues of a job without a new checkpoint."""
    min_free_memory_gb: Gigabytes = 1.0
    """Gigabytes of memory that must be free on a node for each of its ranks before they start."""
    min_free_disk_gb: Gigabytes = 1.0
    """Gigabytes that must be free in the run directory before a start, or twice the last checkpoint if that is more."""
    min_rdma_ports: Annotated[int, Interval(ge=0, le=1024)] = 0
    """Number of InfiniBand or RoCE ports that must be active on a node. 0: one, if the node has any."""

    def __post_init__(self) -> None:
        # As sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.
        if not re.fullmatch(r"([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{1,2}){0,2}", self.time):
            raise ValueError(f"slurm.time = {self.time!r}: must look like 24:00:00 or 7-00:00:00")
        texts = {name: getattr(self, name) for name in ("partition", "account", "job_name")}
        for name, value in {**texts, **{f"options.{name}": value for name, value in self.options.items()}}.items():
            if not re.fullmatch(r"[\w.,:@%+/=\[\]*&|()-]*", value, re.ASCII) or (name == "job_name" and "/" in value):
                raise ValueError(
                    f"slurm.{name} = {value!r}: not an sbatch option; use no spaces and no quotes, and no / in the "
                    "name of a job"
                )
        for name, value in self.options.items():
            if name not in SBATCH_OPTIONS:
                raise ValueError(
                    f"slurm.options.{name} = {value!r}: not an option that a recipe may set; print the job with "
                    "`longring submit --print`, and give the option to sbatch yourself"
                )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The complete settings of a run."""

    run_directory: str
    """Directory that the run writes: resolved recipe, metrics, logs, checkpoints and report."""
    data: DataConfig
    order: OrderConfig
    knots: KnotsConfig
    curriculum: CurriculumConfig
    loader: LoaderConfig
    model: ModelConfig
    init: InitConfig
    parallel: ParallelConfig
    train: TrainConfig
    faults: FaultsConfig
    slurm: SlurmConfig
    evaluate: EvaluateConfig
    track: TrackConfig

    def __post_init__(self) -> None:
        self.order.check(self.data)
        self.knots.check(self.data)
        self.curriculum.tokens_of_slot(self.lengths, self.train.global_batch_tokens)
        self.curriculum.check_names(self.data.prepared_sources, self.lengths)
        # It divides all three sizes, so the advice of one check does not fail another.
        divisor = math.gcd(
            self.parallel.tensor, self.model.num_heads, self.model.num_kv_heads, self.model.ffn_hidden_size
        )
        for name, heads in (("num_heads", self.model.num_heads), ("num_kv_heads", self.model.num_kv_heads)):
            if heads % self.parallel.tensor:
                raise ValueError(
                    f"parallel.tensor = {self.parallel.tensor}: must divide model.{name} = {heads}, since a "
                    f"tensor-parallel rank holds whole heads; set it to {divisor}"
                )
        if self.model.ffn_hidden_size % self.parallel.tensor:
            raise ValueError(
                f"parallel.tensor = {self.parallel.tensor}: must divide model.ffn_hidden_size = "
                f"{self.model.ffn_hidden_size}; set it to {divisor}"
            )
        if self.parallel.sequence_parallel and min(self.lengths) % self.parallel.tensor:
            raise ValueError(
                f"data.min_bucket_tokens = {min(self.lengths)}: must be a multiple of parallel.tensor = "
                f"{self.parallel.tensor}, by which sequence parallelism divides sequences; set "
                "parallel.sequence_parallel = false"
            )

    @property
    def training_directory(self) -> str:
        """Directory of the training data: the ordered data if there is an order, else the prepared data."""
        return self.order.directory or self.data.directory

    @property
    def packs_documents(self) -> bool:
        """Whether a sequence of the training data may hold several documents that attention keeps apart."""
        return self.data.has_boundaries if self.order.mode == "off" else self.order.document_masks

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the buckets that the run uses, ascending, in tokens."""
        ordered = self.order.mode != "off"
        return self.curriculum.lengths_in_use(self.order.lengths(self.data) if ordered else self.data.lengths)

    @property
    def max_context_parallel(self) -> int:
        """Context-parallel degree of the longest bucket in use."""
        return self.parallel.context_parallel(max(self.lengths))

    def to_evaluate(self, world_size: int) -> Recipe:
        """Return the recipe for an evaluation on `world_size` ranks, with a batch that they can divide.

        No batch is trained. The buckets in use, and the division of a sequence among ranks, stay the same.
        """
        # Lengths and tokens_per_rank are powers of two, so the largest is a multiple of all others.
        batch_tokens = world_size * max(self.parallel.tokens_per_rank, *self.lengths)
        return dataclasses.replace(
            self,
            train=dataclasses.replace(self.train, global_batch_tokens=batch_tokens),
            curriculum=dataclasses.replace(self.curriculum, mix="step", slot_tokens=0),
        )

    def accumulation_steps(self, world_size: int) -> int:
        """Return the number of micro-batches of one step on `world_size` ranks.

        Raises ValueError if that many ranks cannot train this recipe.
        """
        data_size = self.parallel.data_size(world_size)
        if data_size % self.max_context_parallel:
            needed = self.max_context_parallel * self.parallel.tensor
            # A ring of the largest power of two that divides the data-parallel ranks holds a sequence.
            held = max(self.lengths) // (data_size & -data_size)
            raise ValueError(
                f"world of {world_size} ranks: cannot hold the longest bucket in use, {max(self.lengths)} tokens, at "
                f"parallel.tokens_per_rank = {self.parallel.tokens_per_rank}; start a multiple of {needed} ranks, or "
                f"set parallel.tokens_per_rank = {held}"
            )
        if data_size % (copied := self.parallel.zero.zero_hpz_partition_size):
            raise ValueError(
                f"parallel.zero.zero_hpz_partition_size = {copied}: does not divide the {data_size} ranks; set it to "
                f"{math.gcd(copied, data_size)}"
            )
        micro_batch_tokens = data_size * self.parallel.tokens_per_rank
        if self.train.global_batch_tokens % micro_batch_tokens:
            raise ValueError(
                f"train.global_batch_tokens = {self.train.global_batch_tokens}: must be a multiple of the "
                f"{micro_batch_tokens} tokens of one micro-batch on {world_size} ranks ({data_size} data-parallel x "
                f"{self.parallel.tokens_per_rank} parallel.tokens_per_rank); set it to "
                f"{_next_multiple(self.train.global_batch_tokens, micro_batch_tokens)}"
            )
        slot = self.curriculum.tokens_of_slot(self.lengths, self.train.global_batch_tokens)
        if slot % micro_batch_tokens:
            raise ValueError(
                f"curriculum.slot_tokens = {slot}: must be a multiple of the {micro_batch_tokens} tokens of one "
                f"micro-batch on {world_size} ranks, which are all of one bucket; set it to "
                f"{next_divisor(self.train.global_batch_tokens, micro_batch_tokens, slot)}"
            )
        return self.train.global_batch_tokens // micro_batch_tokens


def _next_multiple(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


def load_recipe(file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply overrides such as `train.steps=20`.

    Raises ValueError, with the key at fault, if the file cannot be read or a setting is wrong.
    """
    tree = read_toml(Path(file))
    overridden = apply_overrides(tree, overrides)
    return from_tree(Recipe, tree, source=str(file), overridden=overridden)
