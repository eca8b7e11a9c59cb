"""The held-out loss by bucket, and within it by position, source and length of document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ...data.format.bucket import Bucket
from ...data.format.manifest import Manifest
from ...data.read.knots import Knots
from ...data.read.loader import read_rows
from ...parallel.mesh import Mesh
from ...parallel.zero import DeepSpeedEngine
from ..build import BucketLayout
from ..config import Recipe
from .buckets import evenly
from .documents import DocumentLengths


def powers_of_two(first: int, last: int) -> list[int]:
    """Return 0, then `first`, 2 `first`, 4 `first`, ... up to `last`, or the first of them that is above it."""
    edges = [0, first]
    while edges[-1] < last:
        edges.append(2 * edges[-1])
    return edges


@dataclass(frozen=True)
class Breakdown:
    """A breakdown of the targets of a bucket into classes, whose losses are summed apart."""

    name: str
    """Key of the breakdown in results."""
    labels: Sequence[Mapping[str, Any]]
    """Keys of each class in results."""
    classes: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    """Function of the numbers of sequences `[b]`: class of each target, int64 `[b, length]`."""


def ranges(edges: Sequence[int]) -> list[dict[str, int]]:
    """Return the labels of the ranges between ascending edges."""
    return [{"from": first, "to": stop} for first, stop in pairwise(edges)]


def by_source(bucket: Bucket) -> Breakdown:
    """Return the breakdown of a bucket by source."""
    ends = np.cumsum([part.sequences for part in bucket.parts])  # [parts], one past the last sequence of each

    def source(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.repeat(np.searchsorted(ends, numbers, side="right")[:, None], bucket.length, 1)

    return Breakdown("by_source", [{"source": part.source} for part in bucket.parts], source)


@dataclass(frozen=True)
class HeldOutLoss:
    """Measurement of held-out losses, one rank's part; all ranks call its methods in the same order."""

    engine: DeepSpeedEngine
    recipe: Recipe
    manifest: Manifest
    mesh: Mesh
    at: Callable[[str], None] = field(compare=False)
    """Records that an operation begins."""
    documents: DocumentLengths | None = None
    """Lengths of the held-out documents, for losses by it; None: there are none."""

    @cached_property
    def knots(self) -> Knots | None:
        """Knots to tie into the sequences; None: they are read as stored."""
        recipe = self.recipe
        tied = recipe.evaluate.knots and recipe.knots.share
        return Knots(recipe.knots, self.manifest.tokenizer(), recipe.train.seed) if tied else None

    @cached_property
    def unigram_losses(self) -> Tensor:
        """`[vocab_size]`, fp64: the loss of each token under the train split's token counts plus one."""
        # One more of each token: a token that the train split lacks then has a finite loss.
        counts = torch.from_numpy(self.manifest.unigram()).double() + 1
        return (counts.sum().log() - counts.log()).to(self.mesh.device)

    def breakdowns(self, bucket: Bucket) -> list[Breakdown]:
        """Return the breakdowns of a bucket: by position, and where they tell more by source and length of document."""
        edges = powers_of_two(min(self.recipe.lengths), max(self.recipe.lengths))
        by_position = np.searchsorted(edges, np.arange(bucket.length), side="right")[None] - 1  # [1, length]
        found = [
            Breakdown("by_position", ranges(edges), lambda numbers: np.repeat(by_position, len(numbers), 0)),
        ]
        if len(bucket.parts) > 1:
            found.append(by_source(bucket))
        if self.documents is not None and self.knots is None:  # knots mix the documents of a sequence
            lengths, reader = self.documents, self.manifest.reader(bucket)
            edges_of_documents = powers_of_two(min(self.recipe.lengths), lengths.longest)

            def document(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
                of_targets = lengths.of_targets(reader, numbers)  # [b, length]
                # A length that is an edge ends a range ("≤512"); a position that is one begins a range.
                return np.searchsorted(edges_of_documents, of_targets, side="left") - 1

            found.append(Breakdown("by_document", ranges(edges_of_documents), document))
        return found

    def bucket(self, bucket: Bucket, num_sequences: int, layout: BucketLayout) -> dict[str, Any]:
        """Return a bucket's entry of evaluation.json over sequences that lie evenly in the bucket. Collective."""
        breakdowns = self.breakdowns(bucket)
        sums = self.sums(bucket, evenly(bucket, num_sequences), layout, breakdowns)
        entries: dict[str, list[dict[str, Any]]] = {}
        firsts = np.cumsum([0, *(len(breakdown.labels) for breakdown in breakdowns)])  # [breakdowns + 1]
        for breakdown, first in zip(breakdowns, firsts.tolist(), strict=False):
            found = zip(breakdown.labels, sums[:, first:].T.tolist(), strict=False)  # labels end before the sums do
            entries[breakdown.name] = [
                {**label, "loss": loss / tokens, "tokens": int(tokens)} for label, (loss, _, tokens) in found if tokens
            ]
        # The first breakdown is by position, and has every token in one class.
        loss, unigram, tokens = sums[:, : firsts[1]].sum(1).tolist()
        assert self.knots is not None or tokens == num_sequences * bucket.length, "every token counts once"
        return {
            "bucket": bucket.length,
            "cp": layout.context_parallel,
            "sequences": num_sequences,
            "tokens": int(tokens),
            "loss": loss / tokens,
            "unigram_loss": unigram / tokens,
            **entries,
        }

    def sums(
        self, bucket: Bucket, sequences: NDArray[np.int64], layout: BucketLayout, breakdowns: Sequence[Breakdown]
    ) -> Tensor:
        """Return sums over sequences of a bucket by class, those of all breakdowns one after the other. Collective.

        The result is loss, unigram loss and number of tokens, fp64 `[3, classes]` on the CPU.
        """
        mesh, reader, num_sequences = self.mesh, self.manifest.reader(bucket), len(sequences)
        # Sequences of one micro-batch of all replicas; replica r takes the r-th part of each.
        at_once = layout.num_replicas * layout.sequences_per_replica
        num_classes = sum(len(breakdown.labels) for breakdown in breakdowns)
        sums = torch.zeros(3, num_classes, dtype=torch.float64, device=mesh.device)
        for first in range(0, num_sequences, at_once):
            self.at(f"evaluating sequence {first} of {num_sequences} of bucket {bucket.length}, and those after it")
            mine = first + layout.replica * layout.sequences_per_replica + np.arange(layout.sequences_per_replica)
            # The last micro-batch is filled up with the first sequence, which then does not count.
            numbers = sequences[np.where(mine < num_sequences, mine, 0)]
            rows, document_starts, trained = read_rows(reader, numbers, self.manifest.needs_starts, self.knots)
            inputs = layout.model_inputs(rows, document_starts, mesh.device)
            with torch.no_grad():
                losses = self.engine(*inputs)
            # Packed rows come back as one sequence of b = 1: [1, b s] -> [b, s].
            real = torch.from_numpy(mine < num_sequences).to(mesh.device).double()[:, None]
            # [b, s], 1 for each target that counts
            counted = real * layout.trained(trained, losses, inputs[2]).double().view(len(mine), -1)
            losses, targets = losses.double().view(len(mine), -1), inputs[1].view(len(mine), -1)
            # [3, b, s]
            values = torch.stack([losses, self.unigram_losses[targets], torch.ones_like(losses)]) * counted
            positions, offset = layout.positions(inputs[2], mesh.device), 0
            for breakdown in breakdowns:
                classes = torch.from_numpy(breakdown.classes(numbers)).to(mesh.device)[:, positions]  # [b, s]
                sums.index_add_(1, (classes + offset).flatten(), values.flatten(1))  # [b s], [3, b s]
                offset += len(breakdown.labels)
        self.at(f"summing bucket {bucket.length} over the ranks")
        # The ranks of a tensor-parallel group have equal sums, so they are not added.
        dist.all_reduce(sums, group=mesh.data_group)
        return sums.cpu()


def with_means(buckets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries of buckets with the means over all their tokens, by source and by length of document too."""
    tokens = sum(entry["tokens"] for entry in buckets)
    loss, unigram = (sum(e[name] * e["tokens"] for e in buckets) / tokens for name in ("loss", "unigram_loss"))
    over_all = {name: _joined(entry.get(name, ()) for entry in buckets) for name in ("by_source", "by_document")}
    return {
        **{"tokens": tokens, "loss": loss, "unigram_loss": unigram},
        **{name: found for name, found in over_all.items() if found},
        "buckets": list(buckets),
    }


def _joined(of_buckets: Iterable[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the means of classes over several buckets, shortest documents first."""
    sums: dict[tuple[tuple[str, Any], ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for entry in (entry for entries in of_buckets for entry in entries):
        # All other keys name the class.
        total = sums[tuple((key, value) for key, value in entry.items() if key not in ("loss", "tokens"))]
        total[0] += entry["loss"] * entry["tokens"]
        total[1] += entry["tokens"]
    found = [{**dict(key), "loss": loss / tokens, "tokens": int(tokens)} for key, (loss, tokens) in sums.items()]
    return sorted(found, key=lambda entry: entry.get("from", 0))
