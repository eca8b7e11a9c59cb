"""Layout, plans and masks of a micro-batch are made once, by `prepare`, and the training thread only takes them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from longring.kernels.layout import SeqLayout
from longring.launch import build
from longring.launch.config import load_recipe
from longring.launch.grids.choice import attention_shape
from longring.parallel.cp.choose_layout import LayersOf, LayoutPricer
from longring.parallel.cp.cost import Speed
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.packed import divided
from longring.parallel.cp.topology import ethernet

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


def test_ranks_of_a_ring_take_the_tokens_that_the_layout_of_their_documents_gives_them():
    """Tokens, targets and marks are those of the micro-batch's layout, whatever the layout of other micro-batches."""
    rows = np.arange(100, 117, dtype=np.uint16)[None]
    marks = np.random.default_rng(0).random((1, 16)) < 0.5
    seen: list[int] = []
    for index in range(2):
        ring = build.BucketLayout(
            context_parallel=2,
            replica=0,
            num_replicas=1,
            sequences_per_replica=1,
            length=16,
            index=index,
            divide=partial(divided, "balanced", 16, size=2),
            document_masks=True,
            position_resets=True,
            attention=lambda layouts: layouts,  # type: ignore[arg-type, return-value]
        )
        for starts in (None, ((0, 12),)):
            found: Any = ring.model_inputs(rows, starts, CPU)
            tokens, targets, layout, layouts = found
            at = ring.positions(layout, CPU).tolist()
            assert tokens[0].tolist() == [100 + position for position in at]
            assert torch.equal(targets, tokens + 1)
            assert ring.trained(marks, torch.zeros(1, 8), layout)[0].tolist() == marks[0, at].tolist()
            assert layouts[index] == layout and layouts[0].document_starts == (starts[0] if starts else (0,))
        seen += at
    assert sorted(seen) == list(range(16)) and seen[:8] != [0, 1, 2, 3, 12, 13, 14, 15], "not zigzag"


@pytest.mark.parametrize("layout", ["balanced", "documents", "auto"])
def test_a_run_divides_packings_by_the_nodes_and_the_windows_of_its_layers(layout):
    recipe = load_recipe(
        Path(__file__).parents[2] / "launch/recipes/demo.toml",
        [
            "parallel.tokens_per_rank=1024",
            f"parallel.cp.layout={layout}",
            "model.num_layers=4",
            "model.window_tokens=40",
            "model.layer_pattern=['window', 'window', 'full', 'window']",
        ],
    )
    starts, grid, links = (0, 900, 1000, 2500, 2600), CpGrid.ring(4), (ethernet(4, 2), Speed(1e9, 1e9))
    runs = build._division(recipe, 4096, {None: grid, 40: grid}, links)(starts)
    layers = LayersOf(grid, 40, 3), LayersOf(grid, None, 1)
    of_layouts = {
        "balanced": divided("balanced", 4096, starts, 4, ((40, 3), (None, 1))),
        "documents": divided("documents", 4096, starts, 4, ((40, 3), (None, 1)), 2),
        "auto": LayoutPricer(4096, layers, attention_shape(recipe), *links).choose(starts),
    }
    assert runs == of_layouts[layout]
    assert runs not in [divided(name, 4096, starts, 4) for name in ("zigzag", "balanced", "documents")]
