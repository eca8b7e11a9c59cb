"""Starts and evaluations compile kernels before anything else launches one, one rank of a node before the others."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest
from longring.launch import build, evaluate, train
from longring.launch.build import compile_kernels
from longring.launch.config import load_recipe
from longring.launch.errors import CommonError
from longring.launch.ranks.watchdog import Watchdog
from longring.parallel.mesh import join
from rich.console import Console


def order_of_a_start(recipe_file: Path, run: Path) -> list[str]:
    """Return what a start does after it has loaded its weights, and the positions of its watchdog, in order."""
    done: list[str] = []

    def noted(name: str):
        original = getattr(build, name)

        def note(*arguments):
            done.append(name)
            return original(*arguments)

        return note

    at = Watchdog.at
    Watchdog.at = lambda self, step, operation: (done.append(operation), at(self, step, operation))[1]  # type: ignore
    for name in ("compile_kernels", "decide_grids", "bucket_layouts"):
        setattr(build, name, noted(name))
    with_backends = build.with_backends
    build.with_backends = lambda *given: (done.append(f"backends in {given[-1]}"), with_backends(*given))[1]

    prepare = build.BucketLayout.prepare
    build.BucketLayout.prepare = lambda layout, *given: (done.append("prepare"), prepare(layout, *given))[1]  # type: ignore

    def enough(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    train.Loader = enough
    with pytest.raises(KeyboardInterrupt):
        train.train(load_recipe(recipe_file, [f"run_directory={run}"]), Console(quiet=True))
    return done


@pytest.mark.full
def test_kernels_are_compiled_before_probe_and_guards(on_ranks, recipe_file, tmp_path):
    [done] = on_ranks(1, order_of_a_start, recipe_file, tmp_path / "run")
    order = [f"backends in {tmp_path / 'run' / 'attention.json'}"]
    order += ["compiling kernels", "compile_kernels"]
    order += ["dividing attention among ranks", "decide_grids", "bucket_layouts"]
    order += ["prepare"] * 4  # one for each bucket, before the loader's threads begin
    assert done[-len(order) :] == order


class EnoughError(Exception):
    """An evaluation has come as far as the test looks."""


def test_an_evaluation_compiles_before_probe_and_guards(monkeypatch):
    done, target = [], MagicMock()
    target.load.return_value = 3
    monkeypatch.setattr(evaluate, "build_engine", MagicMock())
    monkeypatch.setattr(build, "with_backends", lambda recipe, mesh, lengths, console, file: done.append(file))
    monkeypatch.setattr(build, "compile_kernels", lambda recipe, mesh, lengths: done.append(("compile", lengths)))
    monkeypatch.setattr(build, "decide_grids", MagicMock(side_effect=EnoughError))
    watchdog = MagicMock()
    with pytest.raises(EnoughError):
        evaluate.opened(target, MagicMock(device="cpu"), watchdog, [64])
    assert done == [None, ("compile", [64])], "no record of the run's own backends"
    said = [call.args for call in watchdog.at.mock_calls[1:]]
    operations = ["measuring attention backends", "compiling kernels", "dividing attention among ranks"]
    assert said == [(3, operation) for operation in operations]


def launched_in_turn(recipe_file: Path, file: Path, failing: int | None) -> str | None:
    """Note in a file which rank launches; return the error that this rank then raises. Rank `failing` finds none."""
    recipe = load_recipe(recipe_file)
    mesh = join(recipe.parallel, 1)

    def launch(*_: object) -> None:
        with file.open("a") as opened:
            opened.write(f"{mesh.rank} ")
        if mesh.rank == failing:
            raise OSError("the cache is full")

    build._launch_kernels = launch
    try:
        compile_kernels(recipe, mesh, [64])
    except CommonError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("failing", "launches"), [(None, "0 1 "), (0, "0 "), (1, "0 1 ")])
def test_one_rank_of_a_node_goes_first_and_all_end_with_the_one_that_cannot(
    on_ranks, recipe_file, tmp_path, failing, launches
):
    error = None if failing is None else "the cache is full"
    assert on_ranks(2, launched_in_turn, recipe_file, tmp_path / "launches", failing) == [error] * 2
    assert (tmp_path / "launches").read_text() == launches
