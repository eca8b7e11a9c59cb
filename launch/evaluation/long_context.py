"""Everything that an evaluation measures beside the held-out loss, as its settings choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...data.format.manifest import Manifest
from ...data.tasks.catalog import chosen_tasks
from ...data.tasks.held_out import HeldOut
from ...data.tasks.material import Material
from ..config import EvaluateConfig
from .context import EIGHTHS, HeldOutRows, gain_of_context, long_ppl
from .score import Scorer
from .tasks import score_task

STRIDES = 4
"""LongPPL: number of strides of a short context."""


def long_context(config: EvaluateConfig, manifest: Manifest, scorers: Sequence[Scorer], found: dict[str, Any]) -> None:
    """Add scores of tasks, gain of context and LongPPL at the length of each scorer, shortest first. Collective.

    `found` has what is measured if a scorer ends it early. What a length or the data do not allow is in its `left_out`,
    with the reason. Raises ValueError for an unknown task.
    """
    names = chosen_tasks(config.tasks)
    if not names and not config.context_sequences:
        return
    found |= {"tasks": [], "context": [], "long_ppl": [], "left_out": []}
    material = Material(manifest.tokenizer().tokenizer, manifest.boundary_id, HeldOut(manifest))
    for scorer in scorers:
        length = scorer.layout.length
        for name in names:
            try:
                score = score_task(scorer, name, material, count=config.samples, distractors=config.distractors, seed=0)
                found["tasks"].append(score)
            except ValueError as error:  # every rank raises it alike
                found["left_out"].append({"task": name, "length": length, "reason": str(error)})
        [bucket] = [bucket for bucket in manifest.buckets("held_out") if bucket.length == length]
        rows, count = HeldOutRows.of(manifest, bucket), min(bucket.sequences, config.context_sequences)
        if count and length >= EIGHTHS:
            found["context"].append(gain_of_context(scorer, rows, count))
        if count and length > config.short_tokens:
            stride = config.short_tokens // STRIDES
            found["long_ppl"].append(long_ppl(scorer, rows, count, stride * STRIDES, stride))
