"""`StatefulLoader`: batches of a run as a plain iterable with a state, as torchdata has it, for any trainer."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LoaderConfig
from ..curriculum_config import CurriculumConfig
from ..files import sha256_of
from ..format.manifest import MANIFEST_FILE, open_prepared
from ..format.settings import differences
from .batch_order import ORDER, ReplicaShare
from .loader import Loader, MicroBatch
from .mix import training_order


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of one rank: whole sequences of one bucket."""

    step: int
    """Step of the run, counted from 1."""
    bucket: int
    """Tokens of each sequence."""
    ranks: int
    """Number of adjacent ranks that read these sequences: each holds 1/ranks of their tokens."""
    tokens: Tensor
    """Inputs, int64 [sequences, bucket]."""
    labels: Tensor
    """Targets, int64 [sequences, bucket]: the next token of each input."""
    positions: Tensor
    """Positions in the sequence, int64 [bucket]."""
    document_starts: tuple[tuple[int, ...], ...] | None
    """Positions at which documents begin in each sequence; None where each sequence is one document, or attention need
    not keep its documents apart."""


class StatefulLoader:
    """Iterable of this rank's micro-batches over prepared data, in the order in which `longring train` reads them.

    A step is `global_batch_tokens` over all ranks, in micro-batches of `tokens_per_rank` on each of `num_ranks`. A
    sequence of more tokens is read by as many adjacent ranks as hold it together. Iterating goes on after the last
    micro-batch that was taken and ends with the last step. `state_dict` may be taken after any micro-batch, and loaded
    by any number of ranks; it counts what all iterators have taken, so use one at a time. Knots are not tied. Raises
    ValueError if data, curriculum, batch and ranks do not fit each other.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        steps: int,
        global_batch_tokens: int,
        tokens_per_rank: int,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        curriculum: CurriculumConfig | None = None,
        config: LoaderConfig | None = None,
    ) -> None:
        curriculum, config = curriculum or CurriculumConfig(), config or LoaderConfig()
        if curriculum.renewal.rate:
            raise ValueError(
                f"curriculum.renewal.rate = {curriculum.renewal.rate}: shares follow losses that `longring train` "
                "measures; set it to 0"
            )
        if not 0 <= rank < num_ranks:
            raise ValueError(
                f"rank = {rank}: must be at least 0 and below num_ranks = {num_ranks}; give this rank's own index"
            )
        if min(steps, tokens_per_rank) < 1:
            raise ValueError(
                f"steps = {steps}, tokens_per_rank = {tokens_per_rank}: must be at least 1 each; raise the "
                "one that is 0"
            )
        manifest = open_prepared(directory, config)
        made_of: dict[str, Any] = {"steps": steps, "global_batch_tokens": global_batch_tokens, "seed": seed}
        order = training_order(manifest, curriculum, config, **made_of)
        ranks_of = _ranks_by_length(order.lengths, tokens_per_rank, num_ranks)
        self._at_once = num_ranks * tokens_per_rank  # tokens of one micro-batch
        if order.slot_tokens % self._at_once:
            raise ValueError(
                f"global_batch_tokens = {global_batch_tokens}: slots of {order.slot_tokens} tokens are not whole "
                f"micro-batches of {num_ranks} ranks with {tokens_per_rank} tokens each; set it, and "
                f"curriculum.slot_tokens where that is set, to a multiple of {self._at_once}"
            )

        def share_of(length: int) -> ReplicaShare:
            ranks = ranks_of[length]
            return ReplicaShare(rank // ranks, num_ranks // ranks, max(1, tokens_per_rank // length))

        self._steps, self._step_tokens, self._ranks_of = steps, global_batch_tokens, ranks_of
        self._loader = Loader(manifest, order, config, share_of, hashed_by=(rank, num_ranks))
        self._taken = 0
        """Tokens of the run that all ranks together have taken."""
        manifest_file = manifest.store.path(MANIFEST_FILE)
        content = {"data": sha256_of(manifest_file), "order": ORDER, "window_tokens": config.window_tokens}
        # As JSON gives it back, since a trainer may store the state so: tuples are lists.
        self._made_of = json.loads(json.dumps({**made_of, **content, "curriculum": asdict(curriculum)}))

    def __iter__(self) -> Iterator[Batch]:
        steps_done, tokens = divmod(self._taken, self._step_tokens)  # tokens of the step at work
        for micro_batch in self._loader.batches(steps_done, self._steps):
            if micro_batch.step == steps_done + 1 and micro_batch.micro_step < tokens // self._at_once:
                continue  # taken before the state was
            self._taken += self._at_once  # before the yield: a state taken then counts this batch
            yield self._batch(micro_batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last micro-batch that was taken, equal on all ranks: plain values of some 1 kB."""
        return {"tokens": self._taken, "made_of": self._made_of}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state, which a loader on any number of ranks may have returned.

        Raises ValueError if it is of other data or settings, or of a point within a step that these ranks do not reach.
        """
        for key, before, now in differences("state_dict", state_dict["made_of"], self._made_of):
            raise ValueError(
                f"{key} = {before!r}: is {now!r} in this loader, which would read other batches; make the loader as "
                "the one whose state this is"
            )
        if state_dict["tokens"] % self._step_tokens % self._at_once:
            raise ValueError(
                f"state_dict.tokens = {state_dict['tokens']}: lies within a step, and not between two micro-batches of "
                f"{self._at_once} tokens; load it on as many ranks as took it, or take it at the end of a step"
            )
        self._taken = state_dict["tokens"]

    def _batch(self, micro_batch: MicroBatch) -> Batch:
        rows = torch.from_numpy(micro_batch.rows).long()
        return Batch(
            step=micro_batch.step,
            bucket=micro_batch.length,
            ranks=self._ranks_of[micro_batch.length],
            tokens=rows[:, :-1],
            labels=rows[:, 1:],
            positions=torch.arange(micro_batch.length),
            document_starts=micro_batch.document_starts,
        )


def _ranks_by_length(lengths: Sequence[int], tokens_per_rank: int, num_ranks: int) -> dict[int, int]:
    """Return the number of adjacent ranks that hold a sequence together, by its length.

    Raises ValueError if neither of a length and `tokens_per_rank` divides the other, or if that number does not divide
    the ranks.
    """
    ranks_of = {length: max(1, length // tokens_per_rank) for length in lengths}
    for length, ranks in ranks_of.items():
        if max(length, tokens_per_rank) % min(length, tokens_per_rank) or num_ranks % ranks:
            raise ValueError(
                f"tokens_per_rank = {tokens_per_rank}: {num_ranks} ranks cannot hold sequences of {length} tokens; "
                f"set it to {max(lengths)}"
            )
    return ranks_of
