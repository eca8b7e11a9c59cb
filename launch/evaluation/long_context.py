"""Everything that an evaluation measures beside the held-out loss, as its settings choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.format.manifest import Manifest
from ...data.tasks.catalog import chosen_tasks
from ...data.tasks.held_out import HeldOut
from ...data.tasks.material import Material
from ..config import EvaluateConfig
from .context import EIGHTHS, HeldOutRows, gain_of_context, judged, key_tokens, long_ppl
from .key_tokens import KeyTokens
from .score import Scorer
from .tasks import score_task

STRIDES = 4
"""LongPPL: number of strides of a short context."""


def long_context(
    config: EvaluateConfig,
    manifest: Manifest,
    scorers: Sequence[Scorer],
    found: dict[str, Any],
    keys: KeyTokens | None = None,
) -> None:
    """Add scores of tasks, gain of context and LongPPL at the length of each scorer, shortest first. Collective.

    Each result is added to `found` as soon as it is there, and so is kept if a scorer ends the evaluation early. A
    measurement that a length or the data do not allow is added to its `left_out`, with the reason. `keys` are the key
    tokens of LongPPL; None: the model chooses its own. Raises ValueError for an unknown task.
    """
    names = chosen_tasks(config.tasks)
    if not names and not config.context_sequences:
        return
    found |= {"tasks": [], "context": [], "long_ppl": []}
    material = Material(manifest.tokenizer().tokenizer, manifest.boundary_id, HeldOut(manifest))
    for scorer in scorers:
        length = scorer.layout.length
        for name in names:
            try:
                score = score_task(scorer, name, material, count=config.samples, distractors=config.distractors, seed=0)
                found["tasks"].append(score)
            except ValueError as error:  # every rank raises it alike
                found["left_out"].append({"task": name, "length": length, "reason": str(error)})
        rows = _rows(config, manifest, length)
        if not rows:
            continue
        if length >= EIGHTHS:
            found["context"].append(gain_of_context(scorer, rows))
        else:
            reason = f"the gain of context takes at least {EIGHTHS} tokens; take a longer bucket"
            found["left_out"].append({"task": "context", "length": length, "reason": reason})
        if length > config.short_tokens:
            short, stride = _short(config)
            if keys is None:
                entry = long_ppl(length, short, None, key_tokens(scorer, rows, short, stride))
            else:
                entry = long_ppl(length, short, keys.judge, judged(scorer, rows, keys.by_length[length]))
            found["long_ppl"].append(entry)
        else:
            reason = f"evaluate.short_tokens = {config.short_tokens}: LongPPL takes longer sequences; lower it"
            found["left_out"].append({"task": "long_ppl", "length": length, "reason": reason})


def judge(name: str, config: EvaluateConfig, manifest: Manifest, scorers: Sequence[Scorer]) -> KeyTokens:
    """Return the key tokens of LongPPL that a model of this name chooses. Collective."""
    found = {}
    for scorer in scorers:
        length = scorer.layout.length
        rows = _rows(config, manifest, length)
        if rows and length > config.short_tokens:
            found[length] = np.stack([key for _, key in key_tokens(scorer, rows, *_short(config))])
    return KeyTokens(name, found)


def _rows(config: EvaluateConfig, manifest: Manifest, length: int) -> HeldOutRows | None:
    """Return the held-out rows of a length that the settings choose; None: they choose none."""
    [bucket] = [bucket for bucket in manifest.buckets("held_out") if bucket.length == length]
    count = min(bucket.sequences, config.context_sequences)
    return HeldOutRows.of(manifest, bucket, count) if count else None


def _short(config: EvaluateConfig) -> tuple[int, int]:
    """Return the length of a short context of LongPPL, and its stride."""
    stride = config.short_tokens // STRIDES
    return stride * STRIDES, stride  # rounded down to whole strides
