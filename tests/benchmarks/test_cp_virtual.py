"""benchmarks/cp_virtual.py: its tiles are all the work there is, and its comparison sees errors."""

from __future__ import annotations

import cp_virtual
import pytest
import torch
from lib.cases import Case, inputs
from lib.sections import NO_TIME
from lib.virtual_ranks import RESULTS, Tiles, Trial, Whole, share_of


def trial(mask: str) -> Trial:
    return Trial(Case(mask, 512, 1, 4, 2, 16, "float32"), 4, cp_virtual.ALL)


def one_kernel(
    asked: Trial,
) -> tuple[Whole, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    tensors = tuple(x.detach() for x in inputs(asked.case, "cpu"))
    exact = Whole(asked, "cpu", "reference", tuple(x.double() for x in tensors)).results()
    return Whole(asked, "cpu", "torch_cpu", tensors), tensors, exact


@pytest.mark.parametrize("mask", ["causal", "documents", "window"])
@pytest.mark.parametrize("member", cp_virtual.ALL)
def test_tiles_add_up_to_one_kernel(member, mask):
    asked = trial(mask)
    whole, tensors, exact = one_kernel(asked)
    spec = asked.spec(member, "torch_cpu")
    tiles = Tiles(spec, "cpu", tensors)
    for direction in ("forward", "backward"):
        assert tiles.num_pairs(direction) == whole.mask.num_pairs * asked.case.heads
    found = tiles.forward(None)
    grads = tiles.backward(found)
    if spec.grid.heads > 1:  # a rank has all tokens for its heads; several ranks may have one kv head
        out = torch.cat([out for out, _ in found], dim=2)
        torch.testing.assert_close(out.double(), exact["out"], rtol=1e-4, atol=1e-5)
        return
    for of, (out, lse), parts in zip(spec.layouts, found, grads, strict=True):
        for name, part in zip(("out", "dq", "dk", "dv"), (out, *parts), strict=True):
            wanted = share_of(exact[name], of)
            torch.testing.assert_close(part.double(), wanted, rtol=1e-4, atol=1e-5)
        wanted = share_of(exact["lse"].transpose(1, 2), of)
        torch.testing.assert_close(lse.transpose(1, 2).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("member", cp_virtual.ALL)
def test_rows_say_what_is_right(member):
    asked = trial("documents")
    _, tensors, exact = one_kernel(asked)
    spec = asked.spec(member, "torch_cpu")
    assert cp_virtual.in_process_row(spec, exact, tensors, "cpu")["right"] is True
    for name in RESULTS:
        wrong = {**exact, name: exact[name].clone()}
        last = (..., slice(-1, None)) if name == "lse" else (slice(None), slice(-1, None))
        wrong[name][last] += 1e-3  # the last token alone
        assert cp_virtual.in_process_row(spec, wrong, tensors, "cpu")["right"] is False
        wrong[name][last] = torch.nan
        assert cp_virtual.in_process_row(spec, wrong, tensors, "cpu")["right"] is False


def test_what_the_deadline_leaves_out_is_said():
    rows = cp_virtual.trial_rows(trial("causal"), "cpu", "torch_cpu", deadline=0.0)
    assert [row["note"] for row in rows] == [NO_TIME] * len(cp_virtual.ALL)
    assert not any("right" in row for row in rows), "lack of time is no error"
    [row] = cp_virtual.trial_rows(
        Trial(Case("causal", 512, 1, 3, 3, 16, "float32"), 4, ("ulysses",)),
        "cpu",
        "torch_cpu",
        float("inf"),
    )
    assert row["right"] is None and "does not divide 3 query heads" in row["note"]


def test_a_bar_is_about_the_worst_row():
    rows = [
        {"mask": "causal", "tokens": 1, "member": "ring", "ranks": 2, "tiles_forward": x, "tiles_backward": 1.0}
        for x in (1.01, 1.06, 1.02)
    ]
    forward, backward = cp_virtual.bars(rows)
    assert (forward["value"], forward["met"], backward["met"]) == (1.06, "not met", "met")
    assert [bar["met"] for bar in cp_virtual.bars([])] == ["no row"] * 2
