"""Layout, plans and masks of a micro-batch are made once, by `prepare`, and the training thread only takes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from longring.kernels.layout import SeqLayout
from longring.launch import build

CPU = torch.device("cpu")


def on_one_rank():
    attention = build.attention_on_one_rank("auto", CPU, [None, 4])
    return lambda layouts: attention(*layouts)


def test_a_prepared_batch_needs_no_mask_on_the_training_thread(monkeypatch):
    layout = build.BucketLayout(
        context_parallel=1,
        replica=0,
        num_replicas=1,
        sequences_per_replica=2,
        length=16,
        index=0,
        divide=lambda _: [((0, 16),)],
        document_masks=True,
        position_resets=True,
        attention=on_one_rank(),
    )
    rows, starts = np.arange(34, dtype=np.uint16).reshape(2, 17), ((0, 5), (0, 3, 9))
    q, k, v = torch.randn(3, 1, 32, 2, 16)
    tokens, targets, positions, attend = layout.model_inputs(rows, starts, CPU)
    expected = [attend(q, k, v, window) for window in (None, 4)]
    assert tokens[0].tolist() == [*range(16), *range(17, 33)] and torch.equal(targets, tokens + 1)

    other = on_one_rank()  # its cache is empty
    layout = replace(layout, attention=other)
    prepared = layout.prepare(len(rows), starts)
    assert prepared[0] == positions == SeqLayout(((0, 32),), (0, 5, 16, 19, 25), (0, 5, 16, 19, 25))
    monkeypatch.setattr(build, "host_masks", None)
    *_, attend = layout.model_inputs(rows, starts, CPU, prepared)
    assert all(torch.equal(attend(q, k, v, w), out) for w, out in zip((None, 4), expected, strict=True))
