"""`longring plan` prints the grids of a run before any rank is started, and a mistake in one line."""

from __future__ import annotations

import re

import pytest
from longring.launch import cli
from longring.launch.commands import plan as planner
from longring.launch.config import load_recipe
from longring.launch.grids.choice import LayerKind, attention_shape, pricer
from longring.parallel.cp.choose import Pricer, choose
from longring.parallel.cp.cost import ASSUMED
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.topology import PRESETS
from longring.parallel.cp.visible import Visibility

SPREAD = ("parallel.tokens_per_rank=128", "parallel.cp.topology=full_mesh")


def planned(capsys, recipe_file, *arguments: str) -> str:
    assert cli.main(["plan", str(recipe_file), *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def no_ranks(monkeypatch):
    def refuse(*_):
        raise AssertionError("a rank was started")

    monkeypatch.setattr(planner, "start_ranks", refuse)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_every_bucket_over_several_ranks_has_the_cheapest_grid(capsys, recipe_file, no_ranks):
    text = planned(capsys, recipe_file, *SPREAD)
    recipe = load_recipe(recipe_file, SPREAD)
    assert "4 ranks, 128 tokens on each topology: full mesh (parallel.cp.topology)" in text
    assert "4 query heads and 2 kv heads of 16, 4 bytes a number" in text
    for bucket, size in ((256, 2), (512, 4)):
        found = choose(size, Pricer(bucket, attention_shape(recipe), PRESETS["full_mesh"](4), ASSUMED))
        best, second, third = found[:3]
        sent = sum(price.sent_bytes for price in best.passes.values()) / size / 1e6
        row = f"{bucket} {size} full {best.seconds * 1e3:.3g} {best.exposed_s * 1e3:.3g} {best.peak_bytes / 2**30:.3g} "
        assert row + f"{sent:.4g} {best.grid} (best of {len(found)})" in text
        for other in (second, third):
            assert f"{other.seconds * 1e3:.3g} {other.exposed_s * 1e3:.3g}" in text
            assert str(other.grid) in text
    assert " 128 1 " not in text
    assert "1 communicator over 4 ranks, for sums" in text
    assert re.search(
        r"rings of up to 4 ranks: copies between GPUs of a node that reach each other's memory; each lends "
        r"0\.\d+ GiB \(parallel.cp.peer_copies = auto\)",
        text,
    )


def test_the_transports_of_rings_inside_a_node_and_across(capsys, recipe_file, no_ranks):
    """Rings of 16 ranks reach over two nodes of 8; tensor parallelism and never leave all to NCCL."""
    wired = r"\d+ communicators over {} ranks, about [\d.]+ GiB of a GPU \(estimate for parallel.cp.max_ctas = 8\)"
    across = ["parallel.tokens_per_rank=32", "--topology", "infiniband"]
    text = planned(capsys, recipe_file, *across)
    assert re.search(wired.format(16), text)
    assert "rings of up to 8 ranks: copies" in text
    for settings in (["parallel.cp.peer_copies=never"], ["parallel.tensor=2"]):
        text = planned(capsys, recipe_file, *SPREAD, *settings)
        assert re.search(wired.format(4), text)
        assert "copies" not in text


def test_window_layers_have_rows_of_their_own(capsys, recipe_file, no_ranks):
    windowed = ("model.window_tokens=64", "model.layer_pattern=['window', 'full']")
    text = planned(capsys, recipe_file, *SPREAD, *windowed)
    assert "512 4 64 " in text
    assert "512 4 full" in text
    recipe = load_recipe(recipe_file, (*SPREAD, *windowed))
    pricer = Pricer(512, attention_shape(recipe), PRESETS["full_mesh"](4), ASSUMED, Visibility(window=64))
    assert f"512 4 64 {choose(4, pricer)[0].seconds * 1e3:.3g} " in text


def test_a_named_grid_is_shown_beside_those_of_auto(capsys, recipe_file, no_ranks):
    text = planned(capsys, recipe_file, *SPREAD, "parallel.cp.schedule=token_ring")
    assert "query=4 (named by the recipe)" in text
    assert "next best" in text


def test_heads_are_those_of_a_tensor_parallel_rank(capsys, recipe_file, no_ranks):
    text = planned(capsys, recipe_file, *SPREAD, "parallel.tensor=2")
    assert "8 ranks, 128 tokens on each" in text
    assert "2 query heads and 1 kv heads" in text


def test_the_topology_is_named_or_assumed(capsys, recipe_file, no_ranks):
    probing = (SPREAD[0], "parallel.cp.topology=probe")
    assert "topology: nvswitch (assumed" in planned(capsys, recipe_file, *probing)
    assert "topology: infiniband (assumed" in planned(capsys, recipe_file, *probing, "--ranks", "16")
    assert "topology: ethernet (--topology)" in planned(capsys, recipe_file, *SPREAD, "--topology", "ethernet")


def test_a_run_without_grids_says_so(capsys, recipe_file, no_ranks):
    assert "every bucket fits one rank" in planned(capsys, recipe_file)


def test_the_largest_bucket_is_drawn(capsys, recipe_file, no_ranks, tmp_path):
    picture = tmp_path / "plan.png"
    assert f"drawn: {picture}" in planned(capsys, recipe_file, *SPREAD, "--timeline", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "packed"),
    [
        ([], False),
        (["parallel.cp.layout=auto"], False),
        (["data.rest=pack"], False),
        (["parallel.cp.layout=auto", "data.rest=pack"], True),
    ],
    ids=["one document", "no packings", "zigzag", "packings"],
)
def test_the_drawn_passes_are_those_that_are_priced(recipe_file, settings, packed):
    """Over one document, or a packing where sequences hold several documents and a layout for them is set."""
    recipe, grid = load_recipe(recipe_file, [*SPREAD, *settings]), CpGrid.ring(4)
    asked = pricer(recipe, LayerKind(512, None), PRESETS["full_mesh"](4), ASSUMED)
    assert (len(asked.document_starts) > 1) == packed
    drawn = [panel.total_s for panel in planner.simulate_passes(asked, grid)]
    assert drawn == pytest.approx([price.seconds for price in asked.price(grid).passes.values()])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["parallel.cp.schedule=query=2"], "is a grid of 2 ranks, and a bucket is spread over 4"),
        (["model.num_heads=2", "parallel.cp.schedule=ulysses"], "heads = 4 does not divide 2 query heads"),
        (["--topology", "token_ring"], "--topology token_ring: must be one of nvswitch"),
        (["--ranks", "6"], "world of 6 ranks: cannot hold the longest bucket in use, 512 tokens"),
        (["--measure"], "name the picture with --timeline"),
        (["--timeline", "nowhere/plan.png"], "nowhere is not a directory"),
        (
            ["parallel.tokens_per_rank=512", "--timeline", "plan.png"],
            "nothing to draw, since the longest bucket in use, 512 tokens, fits one rank",
        ),
        (
            ["parallel.tokens_per_rank=512", "--timeline", "plan.png", "--measure"],
            "--measure: every bucket fits one rank",
        ),
    ],
)
def test_an_impossible_plan_is_one_error_line(capsys, recipe_file, no_ranks, arguments, words):
    assert cli.main(["plan", str(recipe_file), *SPREAD, *arguments]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.count("error:") == 1
    assert words in error


@pytest.mark.slow
def test_measured_passes_are_drawn_beside_simulated_ones(capfd, recipe_file, tmp_path):
    """Two ranks of this machine run the planned passes; the picture has both."""
    picture = tmp_path / "measured.png"
    overrides = ["parallel.tokens_per_rank=256", "parallel.cp.topology=full_mesh"]
    assert cli.main(["plan", str(recipe_file), *overrides, "--timeline", str(picture), "--measure"]) == 0
    text = " ".join(capfd.readouterr().out.split())
    assert "forward: measured" in text
    assert "backward: measured" in text
    assert "simulated on full mesh with tiles of that speed" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_mix_of_prepared_data_as_tables_and_a_picture(capsys, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    settings = ["curriculum.shares.@512=[[0, 0.1], [1, 0.5]]", "curriculum.mix=micro_batch", "train.steps=200"]
    assert cli.main(["plan", str(recipe_file), *settings, "--mix", str(tmp_path / "mix.png")]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.replace(str(tmp_path), "").splitlines())) <= 80
    assert "slots of 512 tokens of one bucket, 4 in a step, on at most 1 ranks" in said
    [row] = [line.split() for line in said.splitlines() if line.strip().startswith("@512 ")]
    natural, asked, given, passes, never = row[1], " ".join(row[2:5]), *row[5:]
    assert asked == "10% to 50%"
    assert abs(float(given.rstrip("%")) - 30) < 0.5
    assert float(natural.rstrip("%")) > 0
    assert float(passes) > 1
    assert never == "0"
    assert (tmp_path / "mix.png").stat().st_size > 10_000


def test_the_mix_of_data_that_is_not_prepared(capsys, recipe_file, tmp_path):
    elsewhere = f"data.directory={tmp_path}/none"
    assert "mix: known once" in planned(capsys, recipe_file, elsewhere)
    assert cli.main(["plan", str(recipe_file), elsewhere, "--mix", str(tmp_path / "mix.png")]) == 2
    assert "is not prepared yet; run `longring prepare RECIPE` first" in capsys.readouterr().err
    assert cli.main(["plan", str(recipe_file), "--mix", str(tmp_path / "none" / "mix.png")]) == 2
    assert (
        f"--mix {tmp_path}/none/mix.png: {tmp_path}/none is not a directory; make it first" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["prepare", "plan"])
def test_a_share_of_no_source_or_bucket_is_told_before_data_is_prepared(capsys, recipe_file, tmp_path, command):
    """Score bins are sources; the names that the messages offer are planned."""
    source = f"kind='json', path='{recipe_file.parent}/documents.jsonl'"
    sources = f"{{web={{{source}, score_field='q', score_edges=[1.0]}}, books={{{source}}}}}"
    unprepared = ["data.source={}", f"data.sources={sources}", f"data.directory={tmp_path}/none"]
    offered = {"wbe": "web.1", "web": "web.1", "web.1@6": "web.1@64", "boks": "books"}
    for name, meant in offered.items():
        assert cli.main([command, str(recipe_file), *unprepared, f"curriculum.shares={{'{name}'=0.3}}"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert re.fullmatch(rf"error: curriculum\.shares\.{name}: .*: did you mean {re.escape(meant)}\?", said)
    assert not list(tmp_path.iterdir()), "nothing is begun"
    if command == "plan":
        shares = ", ".join(f"'{name}'=0.1" for name in sorted(set(offered.values())))
        assert "mix: known once" in planned(capsys, recipe_file, *unprepared, f"curriculum.shares={{{shares}}}")
