"""The check before the first step passes correct attention and finds each kind of error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from helpers.lanes import by_lane
from longring.kernels.layout import SeqLayout
from longring.launch import build, guards
from longring.launch.config import load_recipe
from longring.launch.grids import decide
from longring.launch.grids.choice import named_grids
from longring.launch.grids.decide import decide_grids
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import CpGroup, open_rings
from longring.parallel.cp.packed import divided
from longring.parallel.cp.visible import Visibility
from longring.parallel.mesh import join
from torch import nn

SIZE = 4


def wrong(fault: str, group: CpGroup) -> Callable:
    """Return attention over the group, with a fault."""

    def spread(right: tuple[SeqLayout, ...]):
        starts = (0,) if fault == "documents" else right[0].document_starts
        layouts = [SeqLayout(layout.runs, starts) for layout in right]
        whole = divided("documents", sum(layout.num_tokens for layout in right), right[0].document_starts, group.size)
        in_this = fault == "order of documents" and [layout.runs for layout in right] == whole
        if fault == "order" or in_this:  # two ranks are exchanged
            layouts[1], layouts[2] = layouts[2], layouts[1]
        spec = AttentionSpec(CpGrid.token_ring(group.size), tuple(layouts), Visibility(causal=fault != "future"))

        def attend(q, k, v, window):
            if fault == "scale":
                q = q * 1.5
            if fault == "gradient":
                k = k.detach()
            if fault == "nan" and k.requires_grad:
                k.register_hook(lambda gradient: gradient * math.nan)
            out = context_attention(q, k, v, spec, group)
            if fault in ("first", "second"):
                _mix_within(right[group.rank], ("first", "second").index(fault), v, out, group)
            return out

        return attend

    return spread


def _mix_within(layout: SeqLayout, document: int, v: torch.Tensor, out: torch.Tensor, group: CpGroup) -> None:
    """Add the sum of the values of a document's tokens to the results of the same tokens, in place. Collective."""
    at = layout.positions(v.device)
    inside = (at >= layout.document_starts[1]) == bool(document)
    total = v.detach()[:, inside, :1].sum(1, keepdim=True)  # [b, 1, 1, d]
    dist.all_reduce(total, group=next(iter(group.channels.values())))
    out.data[:, inside] += total


def guarded(recipe_file, fault: str, dtype: str, size: int = SIZE, layout: str = "zigzag") -> str:
    """Return the error of the check on this rank, or "passed"; only the ring of rank 3, of `size` ranks, has the fault.

    All rings share the channels of the largest, of all ranks. The tolerance has the margin that its docstring states.
    """
    overrides = ["parallel.tokens_per_rank=128", f"train.dtype={dtype}", f"parallel.cp.layout={layout}"]
    recipe = load_recipe(recipe_file, overrides)
    mesh = join(recipe.parallel, SIZE)
    groups = open_rings(mesh.neighbours, [CpGrid.token_ring(2), CpGrid.token_ring(SIZE)])
    group = groups[size]
    fault = fault if 3 in group.global_ranks else ""
    whole = build.attention_on_one_rank("auto", torch.device("cpu"), [None])
    with pytest.MonkeyPatch.context() as patch:
        margin = 2 if fault else 1 / 3
        patch.setattr(guards, "TOLERANCE", {of: margin * limit for of, limit in guards.TOLERANCE.items()})
        try:
            guards.check_attention(recipe, mesh, group, wrong(fault, group), whole)
        except ValueError as error:
            return str(error)
    return "passed"


FOUND = {
    "future": "leaks",
    "documents": "leaks|differs",
    "order": "leaks|differs",
    "scale": "the loss of a small sequence differs|the gradient of a small sequence differs",
    "gradient": "the gradient of a small sequence differs",
    "nan": "the gradient of a small sequence differs from that of one rank by nan",
    "first": "leaks: token 26 of document [0, 34)",
    "second": "leaks: token 96 of document [34, 104)",
}


@pytest.mark.parametrize("dtype", by_lane(["float32", "bfloat16"], quick=["float32"]))
@pytest.mark.parametrize("fault", by_lane(["", *FOUND], quick=["", "documents", "first"]))
def test_guards(on_ranks, recipe_file, fault, dtype):
    for said in on_ranks(SIZE, guarded, recipe_file, fault, dtype):
        assert any(words in said for words in FOUND.get(fault, "passed").split("|")), said


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "fault", "words"),
    [
        ("auto", "", "passed"),
        ("balanced", "order", FOUND["order"]),
        ("balanced", "documents", FOUND["documents"]),
        ("auto", "order of documents", "with documents divided by 'documents'"),
    ],
)
def test_guards_of_layouts_by_work(on_ranks, recipe_file, layout, fault, words):
    """All that a micro-batch may have are checked."""
    for said in on_ranks(SIZE, guarded, recipe_file, fault, "float32", SIZE, layout):
        assert any(word in said for word in words.split("|")), said


@pytest.mark.parametrize("fault", by_lane(["gradient", "future"], quick=["gradient"], slow=["future"]))
def test_an_error_of_one_ring_is_raised_on_every_rank(on_ranks, recipe_file, fault):
    found = on_ranks(SIZE, guarded, recipe_file, fault, "float32", 2)
    assert len(set(found)) == 1 and found[0].startswith("context parallelism over 2 ranks: ")


@pytest.mark.parametrize("kind", ["random", "constant", "of one weight", "of rank one"])
def test_a_sketch_has_the_norm_of_the_gradient(kind):
    model = nn.Linear(2048, 64, bias=False)
    grad = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    if kind == "constant":
        grad = torch.ones(64, 2048)
    elif kind == "of one weight":
        grad = torch.zeros(64, 2048).index_put((torch.tensor(3), torch.tensor(7)), torch.tensor(5.0))
    elif kind == "of rank one":
        grad = grad[:, :1] * grad[:1]
    model.weight.grad = grad
    assert float(guards._sketch(model).norm()) == pytest.approx(float(grad.norm()), rel=0.15)


OTHERS = {
    "length": ("256 tokens over 2 ranks", "512 tokens over 4 ranks"),
    "layout": ("256 tokens over 2 ranks", "256 tokens over 2 ranks"),
    "taken": ("{None: 'query=2'}", "{None: 'kv=2'}"),
    "parallel.cp.schedule=ring": ("{None: 'query=2'}", "{None: 'kv=2'}"),
    "parallel.cp.schedule=auto": ("{None: 'query=2'}", "{None: 'auto'}"),
    "parallel.cp.narrow_results=false": ("narrow_results = True", "narrow_results = False"),
    "train.dtype=bfloat16": ("float32", "bfloat16"),
}
"""The setting in which rank 2 differs, and the descriptions of rank 0 and of rank 2 in the error."""


def divided_by_grids(recipe_file, other: str) -> str:
    """Return the error of this rank, or "passed"."""
    settings = ["parallel.tokens_per_rank=128", "parallel.cp.schedule=token_ring"]
    lengths = [64, 256, 512]
    mesh = join(load_recipe(recipe_file, settings).parallel, SIZE)
    if dist.get_rank() == 2:
        settings += [other] * ("=" in other)
        lengths = [64, 512] if other == "length" else lengths
        if other == "layout":
            decide.divided = lambda *_: []
        if other == "taken":
            decide.named_grids = lambda *arguments: dict.fromkeys(named_grids(*arguments), CpGrid.ring(2))
    try:
        decide_grids(load_recipe(recipe_file, settings), mesh, lengths)
    except ValueError as error:
        return str(error)
    finally:
        decide.divided, decide.named_grids = divided, named_grids
    return "passed"


@pytest.mark.parametrize("other", by_lane(OTHERS, quick=["layout"]))
def test_a_rank_that_divides_sequences_differently_is_named(on_ranks, recipe_file, other):
    for said in on_ranks(SIZE, divided_by_grids, recipe_file, other):
        assert "1 of 4 ranks, the first of them rank 2, disagree with rank 0 about the division of sequences" in said
        first, _, second = said.partition(" on rank 0, ")
        assert all(words in part for words, part in zip(OTHERS[other], (first, second), strict=True)), said
        assert said.endswith("; start the same code with the same recipe on all nodes")
    assert on_ranks(SIZE, divided_by_grids, recipe_file, "the same") == ["passed"] * SIZE


def guarded_slices(recipe_file) -> str:
    recipe = load_recipe(
        recipe_file,
        [
            "model.num_kv_heads=4",
            "parallel.tokens_per_rank=256",
            "parallel.tensor=4",
            "parallel.sequence_parallel=true",
            "parallel.cp.schedule=token_ring",
        ],
    )
    mesh = join(recipe.parallel, recipe.max_context_parallel)
    lengths = recipe.data.lengths
    found = build.bucket_layouts(recipe, mesh, lengths, decide_grids(recipe, mesh, lengths))
    return f"{found[512].context_parallel} ranks passed"


def test_tensor_parallel_ranks_divide_the_sequence_too(on_ranks, recipe_file):
    assert on_ranks(8, guarded_slices, recipe_file) == ["2 ranks passed"] * 8


def opened_without_descriptors(recipe_file, peer_copies: str) -> str:
    """Open the rings of 2 of 4 ranks, where rank 3 may open no more files; return the error of this rank."""
    recipe = load_recipe(
        recipe_file,
        [
            "parallel.tokens_per_rank=256",
            "parallel.cp.schedule=token_ring",
            f"parallel.cp.peer_copies={peer_copies}",
            "parallel.cp.guards=false",
        ],
    )
    mesh = join(recipe.parallel, recipe.max_context_parallel)
    grids = decide_grids(recipe, mesh, [512])
    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 3:
            patch.setattr(os, "pipe", too_many_files)
        try:
            build.bucket_layouts(recipe, mesh, [512], grids)
        except ValueError as error:
            return str(error)
    return ""


def too_many_files() -> None:
    raise OSError(24, "Too many open files")


@pytest.mark.full
def test_copies_that_fail_in_one_ring_are_an_error_of_every_rank(on_ranks, recipe_file):
    """Rank 0, which prints the errors of its node, is in the other ring."""
    [said] = set(on_ranks(SIZE, opened_without_descriptors, recipe_file, "always"))
    assert said == (
        "parallel.cp.peer_copies: rank 3 cannot lend memory: [Errno 24] Too many open files; "
        'set parallel.cp.peer_copies = "never"'
    )
    assert on_ranks(SIZE, opened_without_descriptors, recipe_file, "never") == [""] * SIZE
