"""Pictures of the experiments on learning, from results of every shape that a half-done experiment has."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from decomposition import ARMS, BASELINE, CASES, summary
from lib.learning_pictures import draw_copying, draw_knots, draw_lengths, draw_related, mean_needles
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = [(part / 8, (part + 1) / 8) for part in range(8)]


def scores(right: float) -> list[dict]:
    parts = [{"from": low, "to": high, "tokens": right * (1 - low / 2)} for low, high in DEPTHS]
    return [
        {"task": task, "length": length, "gain": 5 * right, "tokens": right, "exact": right, "by_depth": by_depth}
        for length in LENGTHS
        for task, by_depth in (("copy_text", []), ("copy_random", []), ("needle_single_1", parts), ("backtrace", []))
    ]


def checkpoint(step: int, loss: float, right: float) -> dict:
    buckets = [
        {
            "length": length,
            "loss": loss + 100 / length,
            "by_position": [[stop, loss + 100 / stop, stop] for stop in LENGTHS if stop <= length],
        }
        for length in LENGTHS
    ]
    one = {"step": step, "tokens": 8192 * step, "seconds": 0.4 * step, "loss": loss}
    return {**one, "buckets": buckets, "tasks": scores(right)}


def lengths_rows(arms: list[str], seeds: int) -> list[dict]:
    draw = random.Random(0)
    return [
        {
            "arm": arm,
            "seed": seed,
            "checkpoints": [
                checkpoint(step, 2 + 300 / step - 0.05 * arms.index(arm) + draw.gauss(0, 0.02), step / 2400)
                for step in range(300, 2401, 300)
            ],
        }
        for seed in range(seeds)
        for arm in arms
    ]


@pytest.fixture
def figures(monkeypatch):
    """Return the figures that are drawn, which are not written as files."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    return found


def ends(figure: Figure, panel: int) -> dict[str, list[float]]:
    """Return the values of each line of a panel, by its label."""
    found = {}
    for bars in figure.axes[panel].containers:
        assert isinstance(bars, ErrorbarContainer)
        found[bars.get_label()] = np.asarray(bars.lines[0].get_ydata()).tolist()
    return found


def test_losses_are_drawn_beside_the_baseline_of_their_seed(figures):
    rows = lengths_rows([BASELINE, "grow-p2"], seeds=2)
    draw_lengths(rows, summary(rows, list(ARMS)), BASELINE, Path("lengths.png"))
    [figure] = figures
    of = {(row["arm"], row["seed"]): row["checkpoints"][-1]["loss"] for row in rows}
    less = sum(of["grow-p2", seed] - of[BASELINE, seed] for seed in (0, 1)) / 2
    for panel in (1, 2):
        drawn = ends(figure, panel)
        assert drawn[BASELINE] == [0] * len(LENGTHS)
        assert drawn["grow-p2"] == pytest.approx([less] * len(LENGTHS))
    assert [text.get_text() for text in figure.axes[5].get_yticklabels()] == ["grow-p2\n2 of 2 seeds"]


@pytest.mark.parametrize("arms", [["grow-p2"], [BASELINE]])
def test_an_experiment_that_has_just_begun_is_drawn(arms, figures):
    rows = lengths_rows(arms, seeds=1)
    draw_lengths(rows, summary(rows, CASES["full"].arms), BASELINE, Path("lengths.png"))
    assert ends(figures[0], 0).keys() == set(arms)
    assert bool(ends(figures[0], 1)) is (arms == [BASELINE])


def test_gains_stand_at_their_number_of_documents(figures):
    behind = [{"documents": count, "related": 1.9, "other": 2.0, "gain": count / 10} for count in (1, 4)]
    draw_related([{"arm": "path", "alone": 2.2, "behind": behind}], ["path", "random"], Path("related.png"))
    assert ends(figures[0], 0) == {"path": [0.1, 0.4]}
    assert ends(figures[0], 1) == {"path, related": [2.2, 1.9, 1.9], "path, others": [2.2, 2.0, 2.0]}


def test_needles_are_means_over_kinds_and_seeds():
    rows = [{**checkpoint(9, 2.0, right), "arm": "share 0.3"} for right in (0.2, 0.6)]
    found = mean_needles(rows, LENGTHS)
    assert (found["target"], found["step"]) == ("share 0.3", 9)
    assert [part["tokens"] for part in found["tasks"][0]["by_depth"]] == pytest.approx(
        [0.4 * (1 - d / 2) for d, _ in DEPTHS]
    )


def test_knots_have_a_heat_map_for_each_share_that_has_results(figures):
    rows = [{**checkpoint(9, 2.0, 0.5), "arm": arm} for arm in ("not extended", "share 0.8")]
    draw_knots(rows, ["not extended", "base alone", "share 0", "share 0.3", "share 0.8"], LENGTHS, Path("knots.png"))
    assert [axes.get_visible() for axes in figures[0].axes[:10]] == [True, *[False] * 3, *[True] * 5, False]
    assert ends(figures[0], 7)["share 0.8"] == [2.5] * len(LENGTHS)


def test_a_picture_is_a_file(tmp_path):
    rows = [{"arm": "128 wide", "checkpoints": [checkpoint(step, 2.0, step / 20) for step in (5, 10)]}]
    draw_copying(rows, (512, 4096), tmp_path / "copying.png")
    assert (tmp_path / "copying.png").read_bytes().startswith(b"\x89PNG")
