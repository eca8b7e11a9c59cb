"""Settings that make a recipe fit: memory, ZeRO stage, tensor degree and tokens of a rank, by the time of a step.

A setting has a lower bound of its time, without the messages of attention, and of its memory, without what attention
holds of other ranks. Both take microseconds, so all settings are bounded first; grids are priced for the most promising
ones only, until no bound is below what has been found. The result is that of pricing all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from ...parallel.config import ZeroConfig
from ...parallel.cp.topology import Topology
from ..config import Recipe
from ..grids.choice import GridChoice, check_named_grids, choose_grids
from .device import Device
from .links import Links, links_of
from .memory import Memory, moments, peak
from .time import StepTime, time_of

LEVELS = ("keep", "recompute_mlp", "recompute_layer", "offload")
OFFLOADS = {0: (("none", "none"),), 1: (("none", "none"), ("cpu", "none")), 2: (("none", "none"), ("cpu", "none"))}
OFFLOADS[3] = (*OFFLOADS[2], ("cpu", "cpu"))
"""offload_optimizer and offload_param that are tried in each ZeRO stage."""
SMALLER = 4
"""Tokens of a rank are tried from the shortest bucket, or the recipe's own divided by this, to the longest bucket."""


class Setting(NamedTuple):
    """One point of the search."""

    tokens_per_rank: int
    zero_stage: int
    tensor: int
    activations: str
    offload_optimizer: str
    offload_param: str

    @classmethod
    def of(cls, recipe: Recipe) -> Setting:
        """Return the setting of a recipe."""
        parallel = recipe.parallel
        offloads = parallel.zero.offload_optimizer, parallel.zero.offload_param
        return cls(
            parallel.tokens_per_rank, parallel.zero_stage, parallel.tensor, recipe.train.memory.activations, *offloads
        )

    def applied(self, recipe: Recipe) -> Recipe:
        """Return the recipe with this setting. Raises ValueError if its settings do not go together.

        A first tensor degree above 1 brings sequence parallelism, and another ZeRO stage DeepSpeed's settings of it.
        """
        parallel, tensor = recipe.parallel, self.tensor
        offloads: dict[str, Any] = {"offload_optimizer": self.offload_optimizer, "offload_param": self.offload_param}
        zero = parallel.zero if self.zero_stage == parallel.zero_stage else ZeroConfig()
        sequence = parallel.sequence_parallel if parallel.tensor > 1 else True
        stage: Any = self.zero_stage
        level: Any = self.activations
        return replace(
            recipe,
            parallel=replace(
                parallel,
                tokens_per_rank=self.tokens_per_rank,
                tensor=tensor,
                sequence_parallel=sequence and tensor > 1,
                zero_stage=stage,
                zero=replace(zero, **offloads),
            ),
            train=replace(recipe.train, memory=replace(recipe.train.memory, activations=level)),
        )

    def changes(self, recipe: Recipe) -> dict[str, int | str]:
        """Return the keys of a recipe that this setting changes, with their new values."""
        # Names in the order of the fields of Setting.
        keys = ("tokens_per_rank", "zero_stage", "tensor")
        names = [*(f"parallel.{key}" for key in keys), "train.memory.activations"]
        names += [f"parallel.zero.{key}" for key in ("offload_optimizer", "offload_param")]
        before = Setting.of(recipe)
        found = {name: new for name, new, old in zip(names, self, before, strict=True) if new != old}
        applied = self.applied(recipe).parallel.sequence_parallel
        if applied != recipe.parallel.sequence_parallel:
            found["parallel.sequence_parallel"] = applied
        return found


class Bucket(NamedTuple):
    """Prediction of one bucket."""

    length: int
    cp: int
    """Number of ranks that share a sequence."""
    memory: Memory
    time: StepTime
    grids: tuple[GridChoice, ...]
    """Grids of its layer kinds; none if a sequence fits one rank."""


@dataclass(frozen=True)
class Plan:
    """Prediction of a recipe on a world of devices, by bucket in ascending order of length."""

    recipe: Recipe
    buckets: tuple[Bucket, ...]
    tokens: Mapping[int, int]
    """Tokens that the run trains in each bucket; empty if the mix is not known."""

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of a step by part, as a mean over the run; of the longest bucket if the mix is not known."""
        # All steps have equally many tokens, so buckets have the weights of their tokens in the mean over steps.
        tokens = [self.tokens.get(bucket.length, 0) for bucket in self.buckets]
        if not any(tokens):
            tokens[-1] = 1
        parts = [bucket.time.by_part() for bucket in self.buckets]
        return {
            part: sum(count * of[part] for count, of in zip(tokens, parts, strict=True)) / sum(tokens)
            for part in parts[0]
        }

    @cached_property
    def seconds(self) -> float:
        """Seconds of a step, as a mean over the run; on the longest bucket if the mix is not known."""
        return sum(self.parts.values())

    @property
    def fullest(self) -> Bucket:
        """Bucket that takes the most memory."""
        return max(self.buckets, key=lambda bucket: bucket.memory.total)

    @property
    def memory_bytes(self) -> int:
        """Largest memory of a rank in any bucket."""
        return self.fullest.memory.total


@dataclass
class Planner:
    """Plans of one model on one world of devices; prices of attention are kept from setting to setting."""

    recipe: Recipe
    world_size: int
    vocab_size: int
    device: Device
    topology: Topology
    """Links between all ranks."""
    tokens: Mapping[int, int] = field(default_factory=dict)
    """Tokens that the run trains in each bucket; empty if its data is not prepared."""
    _prices: dict[tuple[int, int, int], tuple[GridChoice, ...]] = field(default_factory=dict)

    def plan(self, recipe: Recipe, lengths: Sequence[int] = ()) -> Plan:
        """Return the plan of a recipe that differs from `self.recipe` in settings of the search or in its lengths.

        It has the buckets of `lengths`, or all. Raises ValueError if the ranks cannot train the recipe.
        """
        recipe.accumulation_steps(self.world_size)
        return Plan(recipe, tuple(self._bucket(recipe, length) for length in lengths or recipe.lengths), self.tokens)

    def _bucket(self, recipe: Recipe, length: int) -> Bucket:
        """Return the prediction of one bucket, whose grids are priced once for all settings that share them."""
        links = self._links(recipe)
        # Of the settings of the search, grids depend on these alone.
        key = (length, recipe.parallel.tokens_per_rank, recipe.parallel.tensor)
        if key not in self._prices:
            self._prices[key] = tuple(choose_grids(recipe, [length], links.data_ranks, self.device.attention))
        grids = self._prices[key]
        return self._predicted(recipe, length, grids)

    def _predicted(self, recipe: Recipe, length: int, grids: tuple[GridChoice, ...]) -> Bucket:
        """Return the prediction of one bucket with these grids; a lower bound if it needs some and has none."""
        of = recipe, self.world_size, length, self.vocab_size
        seconds = time_of(*of, self.device, self._links(recipe), grids)
        memory = peak(moments(*of, on_gpu=self.device.is_gpu, grids=[choice.taken for choice in grids]))
        return Bucket(length, recipe.parallel.context_parallel(length), memory, seconds, grids)

    def _links(self, recipe: Recipe) -> Links:
        return links_of(recipe, self.world_size, self.topology)

    def fits(self, plan: Plan) -> bool:
        """Return whether every bucket fits the device."""
        return plan.memory_bytes <= self.device.memory_bytes

    def settings(self, recipe: Recipe | None = None) -> Iterator[tuple[Setting, Recipe]]:
        """Yield all settings of the search that go together, each with its recipe."""
        recipe = recipe or self.recipe
        longest, own = max(recipe.lengths), recipe.parallel.tokens_per_rank
        shortest = max(1, min(*recipe.lengths, own // SMALLER))
        tokens = {2**power for power in range(shortest.bit_length() - 1, longest.bit_length())}
        tokens.add(own)
        most = min(self.topology.ranks_per_node, self.world_size)  # tensor parallelism stays inside a node
        tensors = {2**power for power in range(most.bit_length())} | {recipe.parallel.tensor}
        for count, stage, tensor, level in product(sorted(tokens), OFFLOADS, sorted(tensors), LEVELS):
            for offloads in OFFLOADS[stage]:
                setting = Setting(count, stage, tensor, level, *offloads)
                try:
                    applied = setting.applied(recipe)
                    applied.accumulation_steps(self.world_size)
                    check_named_grids(applied)
                except ValueError:
                    continue
                yield setting, applied

    def best(self, settings: Iterable[tuple[Setting, Recipe]], count: int) -> list[Plan]:
        """Return the plans of the fastest useful settings that fit, at most `count`, fastest first.

        A setting is of no use if some of its changes alone fit and are no slower.
        """
        bounds = [bound for _, recipe in settings if self.fits(bound := self._bound(recipe))]
        plans: list[Plan] = []
        found: list[Plan] = []
        # `found` has the best of the settings before this one; this one and all after it take at least `bound.seconds`.
        for bound in sorted(bounds, key=lambda bound: bound.seconds):
            if len(found) == count and found[-1].seconds < bound.seconds:
                break
            # A closer bound prices the grids of the longest bucket alone.
            longest = self.plan(bound.recipe, bound.recipe.lengths[-1:])
            closer = replace(bound, buckets=bound.buckets[:-1] + longest.buckets)
            if self.fits(longest) and (len(found) < count or closer.seconds <= found[-1].seconds):
                plan = self.plan(bound.recipe)
                plans += [plan] * self.fits(plan)
                found = self.useful(plans)[:count]
        return found

    def useful(self, plans: Sequence[Plan]) -> list[Plan]:
        """Return the plans without those of which fewer changes are no slower, fastest first."""
        found: list[tuple[Plan, set[tuple[str, int | str]]]] = []
        sizes = {id(plan): set(Setting.of(plan.recipe).changes(self.recipe).items()) for plan in plans}
        # Of equal times, a subset of changes comes before the whole.
        for plan in sorted(plans, key=lambda p: (p.seconds, len(sizes[id(p)]), p.memory_bytes)):
            changes = sizes[id(plan)]
            if not any(fewer < changes for _, fewer in found):  # proper subset; plans in `found` are no slower
                found.append((plan, changes))
        return [plan for plan, _ in found]

    def nearest(self) -> Plan | None:
        """Return the fastest of the settings that fit with the fewest changes of the recipe; None: none fits."""
        by_changes: dict[int, list[tuple[Setting, Recipe]]] = {}
        for setting, recipe in self._all:
            by_changes.setdefault(len(setting.changes(self.recipe)), []).append((setting, recipe))
        return next((found[0] for _, some in sorted(by_changes.items()) if (found := self.best(some, 1))), None)

    def three_best(self) -> list[Plan]:
        """Return the plans of the three fastest useful settings that fit."""
        return self.best(self._all, 3)

    def longest(self) -> Plan | None:
        """Return a plan, of its longest bucket, with the longest context that fits at the recipe's batch; None: none.

        Of the settings that reach it, it has the most tokens on a rank.
        """
        length = 2 ** (self.recipe.train.global_batch_tokens.bit_length() - 1)  # the longest that a batch holds
        while length >= min(self.recipe.lengths):
            try:
                recipe = with_longest(self.recipe, length)
            except ValueError:
                return None
            may_fit = [one for one in self.settings(recipe) if self.fits(self._bound(one[1]))]
            own = self.recipe
            for _, applied in sorted(may_fit, key=lambda one: (-one[0].tokens_per_rank, len(one[0].changes(own)))):
                plan = self.plan(applied, [length])
                if self.fits(plan):
                    return plan
            length //= 2
        return None

    @cached_property
    def _all(self) -> list[tuple[Setting, Recipe]]:
        return list(self.settings())

    def _bound(self, recipe: Recipe) -> Plan:
        """Return a recipe's plan if attention sends nothing and holds nothing of other ranks.

        It has the longest bucket and those that the run trains: its time and memory are lower bounds.
        """
        *others, longest = recipe.lengths  # ascending
        lengths = (*(length for length in others if self.tokens.get(length)), longest)
        return Plan(recipe, tuple(self._predicted(recipe, length, ()) for length in lengths), self.tokens)


def with_longest(recipe: Recipe, length: int) -> Recipe:
    """Return a recipe whose longest bucket has `length` tokens. Raises ValueError if that cannot be."""
    data = replace(recipe.data, max_bucket_tokens=length)
    return replace(recipe, data=data, curriculum=replace(recipe.curriculum, max_bucket_tokens=0))
