"""`longring evaluate A B C`: targets side by side in tables, JSON and a picture, and a judge of key tokens."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ranks import on_ranks as start_on_ranks
from longring.launch import cli, evaluate
from longring.launch.commands import evaluate as command
from longring.launch.config import load_recipe
from longring.launch.errors import print_error
from longring.launch.evaluation import context
from longring.launch.evaluation.compare import comparison_tables
from longring.launch.evaluation.key_tokens import KeyTokens
from longring.launch.report.evaluation_pictures import HEIGHT, draw_evaluations, draw_heat_map
from longring.launch.report.evaluation_tables import evaluation_tables, left_out_tables, long_context_tables
from longring.launch.run_directory import RunDirectory
from longring.launch.train import train
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console
from rich.table import Table

MEASURED = [
    *("evaluate.samples=2", "evaluate.context_sequences=1", "evaluate.short_tokens=128"),
    "evaluate.max_tokens_per_bucket=512",
]


def trained(recipe_file: Path, overrides: list[str]) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True))


def ranked(arguments: Sequence[str]) -> str:
    """Run a rank, for which most tokens are key tokens; return its error, or nothing."""
    errors: list[str] = []

    def unframed(work: Callable[[], None]) -> int:
        try:
            work()
        except ValueError as error:
            errors.append(str(error))
        return len(errors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "as_rank", unframed)
        patch.setattr(context, "LONG_SHORT_NATS", -0.01)
        patch.setattr(context, "LONG_NATS", 9.0)
        evaluate.main(arguments)
    return "".join(errors)


@pytest.fixture(scope="module")
def run(on_ranks, recipe_file, tmp_path_factory) -> Path:
    """A run with a checkpoint after two and after four steps."""
    directory = tmp_path_factory.mktemp("targets") / "run"
    steps = ["train.steps=6", "train.checkpoint_every_steps=2", f"run_directory={directory}"]
    on_ranks(1, trained, recipe_file, steps)
    return directory


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Arguments of the ranks that the command has started, here by fork."""
    calls: list[list[str]] = []

    def start_ranks(module: str, arguments: Sequence[str], count: int, *_: object, **__: object) -> int:
        assert module == "longring.launch.evaluate"
        calls.append([*arguments])
        error = start_on_ranks(count, ranked, calls[-1])[0]
        if error:
            print_error(error)
        return 2 if error else 0

    monkeypatch.setattr(command, "start_ranks", start_ranks)
    return calls


@pytest.mark.slow
def test_targets_stand_side_by_side_and_a_judge_chooses_their_key_tokens(run, started, recipe_file, tmp_path, capfd):
    checkpoints = [str(run / "checkpoints" / f"step-0000000{step}") for step in (2, 4)]
    data = load_recipe(recipe_file).data.directory
    files = ["--json", str(tmp_path / "found.json"), "--picture", str(tmp_path / "found.png")]
    words = ["evaluate", *checkpoints, "--data", data, "--ranks", "2", "--tasks", "copy_text,needle_single_1"]
    assert cli.main([*words, "--judge", checkpoints[0], *MEASURED, *files]) == 0
    assert ["--choose-keys" in call for call in started] == [True, False, False]
    found = json.loads((tmp_path / "found.json").read_text())["targets"]
    assert [(result["target"], result["step"]) for result in found] == [("step-00000002", 2), ("step-00000004", 4)]
    assert found[1]["loss"] < found[0]["loss"]
    assert [entry["judge"] for result in found for entry in result["long_ppl"]] == ["step-00000002"] * 4
    keys = [[entry["key_tokens"] for entry in result["long_ppl"]] for result in found]
    assert keys[0] == keys[1] and min(keys[0]) > 0, "tokens of the judge, not of each target"
    shown = capfd.readouterr().out
    assert re.search(r"B +step-00000004 +4", shown) and f"{found[1]['loss']:.3f}" in shown
    assert imread(tmp_path / "found.png").std() > 0.05
    assert cli.main(["evaluate", str(run), "--judge", checkpoints[0]]) == 2
    assert "chooses tokens of the data that all targets read; name these with --data" in capfd.readouterr().err


@pytest.mark.full
def test_a_judge_without_a_long_sequence_says_what_to_set(run, started, recipe_file, tmp_path, capfd):
    words = ["evaluate", str(run), "--data", load_recipe(recipe_file).data.directory, "--judge", str(run)]
    words += ["--ranks", "1", "evaluate.max_tokens_per_bucket=512"]
    one, below = "evaluate.context_sequences=1", "evaluate.short_tokens=256"
    for settings, longest in (
        ([below], 512),
        ([one], 512),
        ([one, "evaluate.short_tokens=512"], 512),
        ([one, below, "evaluate.max_tokens_per_bucket=256"], 256),
    ):
        assert cli.main([*words, *settings]) == 2
        assert (
            "set evaluate.context_sequences above 0 and evaluate.short_tokens below the longest bucket that is read, "
            f"{longest} tokens, or leave out --judge"
        ) in capfd.readouterr().err
    assert not started, "no rank is started for a judge without key tokens"
    files = [one, below, "--picture", str(tmp_path / "found")]
    assert cli.main([*words, *files]) == 2
    assert "name a file that ends in .png, .svg or .pdf" in capfd.readouterr().err
    assert cli.main([*words, *files[:-1], str(tmp_path / "found.svg")]) == 0
    assert "<svg" in (tmp_path / "found.svg").read_text()
    assert ["--choose-keys" in call for call in started] == [True, False]


def result(number: int, buckets: Sequence[int]) -> dict[str, Any]:
    """Return the result of a target, with losses that tell it from others."""
    entries = [
        {
            **{"bucket": length, "cp": 1, "tokens": length, "loss": number + 1 / length, "unigram_loss": 7.5},
            "by_position": [{"from": 0, "to": stop, "loss": number + stop / 1e6} for stop in buckets if stop <= length],
        }
        for length in buckets
    ]
    task = {"task": "needle_multivalue", "lower_bound": True, "exact": number / 9, "loss": number / 7, "gain": None}
    tasks = [
        {**task, "length": length, "by_depth": [{"from": 0.5, "to": 0.6, "exact": number / 9}]} for length in buckets
    ]
    context = {"length": buckets[-1], "losses": [number + eighth / 8 for eighth in range(8)], "gain": 0.1}
    return {
        **{"target": f"runs/a-long-name-of-a-run-{number}/checkpoints/step-00001000", "step": 1000 * number},
        **{"tokens": 9, "loss": number / 3, "unigram_loss": 7.5, "buckets": entries, "tasks": tasks},
        **{"context": [{**context, "gain_error": 0.01}], "by_source": [{"source": "[web]", "loss": 2.5, "tokens": 9}]},
    }


@pytest.mark.parametrize("count", [2, 8])
def test_eight_targets_are_whole_at_80_columns(capsys, count):
    results = [result(number, [2**power for power in range(10, 18)]) for number in range(count)]
    results[-1] = result(count - 1, [1024])  # a target of other data
    Console(width=80).print(*comparison_tables(results))
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    for found in results:
        for entry in found["buckets"]:
            assert f"{entry['loss']:.3f}" in shown
            assert f"{entry['by_position'][-1]['loss']:.3f}" in shown
        assert f"≥{found['tasks'][0]['exact']:.0%}" in shown
    assert "[web]" in shown and shown.count("Loss of the last eighth by") == 1 + (count - 1) // 6


def lines_at(width: int, tables: Sequence[Table]) -> list[list[str]]:
    """Return the words of each line of tables in a terminal of this width."""
    console = Console(width=width)
    with console.capture() as capture:
        console.print(*tables)
    return [line.replace("─", " ").split() for line in capture.get().splitlines()]


ALL_LENGTHS = [2**power for power in range(31)]
"""The lengths of the buckets of the data that has the most of them."""


def long_result(number: int) -> dict[str, Any]:
    """Return a result with every length, short names, and wide numbers."""
    found = result(number, ALL_LENGTHS)
    scores = {"references": 1.0, "tokens": 1.0, "exact": 1.0, "preferred": 1.0}
    nats = {"loss": 12.345, "gain": -1.234, "margin": -12.345}
    tasks = [{**task, **scores, **nats} for task in found["tasks"]]
    losses = {"losses": [12.345] * 8, "gain": -12.345, "gain_error": 12.345}
    long_ppl = {"short": 2**29, "judge": "j", "key_tokens": 2**40, "tokens": 2**50, "long_ppl": 1234.567}
    for entry in found["buckets"]:
        entry |= {"tokens": 2**50, "loss": 12.345, "unigram_loss": 12.345}
        entry["by_position"] = [{**part, "loss": 12.345} for part in entry["by_position"]]
    return {
        **found,
        **{"target": f"run-{number}", "step": 99_999_999, "loss": 12.345, "unigram_loss": 12.345, "tokens": 2**50},
        "by_document": [{"from": 0, "to": length, "loss": 12.345, "tokens": 2**50} for length in ALL_LENGTHS],
        **{"tasks": tasks, "context": [{**losses, "length": length} for length in ALL_LENGTHS]},
        "long_ppl": [{**long_ppl, "length": length} for length in ALL_LENGTHS],
        "left_out": [{"length": 2**30, "reason": "too long"}, {"task": "copy_text", "length": 1, "reason": "short"}],
    }


def test_no_cell_of_the_most_lengths_is_folded_at_80_columns():
    one = long_result(1)
    tables = [*evaluation_tables(one), *long_context_tables(one), *left_out_tables(one)]
    for table in [*tables, *comparison_tables([long_result(number) for number in range(8)])]:
        title, table.title, table.caption = table.title, None, None  # prose may take several lines
        assert lines_at(80, [table]) == lines_at(400, [table]), title


def test_a_gain_that_rounds_to_zero_has_no_sign():
    """-0.0001 is 0.00, and a loss that falls by it is not below zero."""
    one = long_result(1)
    one["tasks"] = [{**task, "gain": -1e-4, "margin": -1e-4} for task in one["tasks"]]
    one["context"] = [{**entry, "gain": -1e-4, "gain_error": 0.0} for entry in one["context"]]
    for tables in (long_context_tables(one), comparison_tables([one, one])):
        shown = [word for line in lines_at(80, tables) for word in line]
        assert "0.000" in shown and not any(word.startswith("-0") for word in shown)


def test_what_is_left_out_of_each_target_is_told(capsys):
    results = [result(number, [1024]) for number in range(3)]
    for one in results[1:]:
        one["left_out"] = [{"task": "needle_multikey_3", "length": 1024, "reason": "does not fit [there]"}]
    results[2]["left_out"] += [{"length": 2048, "reason": "evaluate.max_tokens_per_bucket = 9: below one sequence"}]
    Console(width=80).print(*comparison_tables(results))
    shown = " ".join(capsys.readouterr().out.split())
    assert "B C needle_multikey_3 1k does not fit [there] C all 2k evaluate.max_tokens_per_bucket = 9" in shown


def test_heat_maps_of_one_target_fill_the_rows_of_a_picture(tmp_path):
    """Heat-maps of several targets stand side by side, so each task begins a row."""
    one = result(1, [1024])
    one["tasks"] = [{**one["tasks"][0], "task": name} for name in ("uuid", "copy", "needle")]
    for results, rows in (([one], 3), ([one, one], 4)):
        draw_evaluations(results, tmp_path / "found.png")
        assert imread(tmp_path / "found.png").shape[0] == round(rows * HEIGHT * 120)


def test_numbers_of_a_heat_map_are_read_on_every_colour():
    """Their contrast, as the WCAG defines it, is at least 4."""
    shares = np.linspace(0, 1, 101)
    axes = Figure().subplots()
    parts = [{"from": share, "to": share + 0.01, "exact": share} for share in shares.tolist()]
    draw_heat_map(
        axes, {"target": "run", "step": 1, "tasks": [{"task": "uuid", "length": 64, "by_depth": parts}]}, "uuid"
    )
    [image] = axes.images
    colours = np.stack([image.to_rgba(shares)[:, :3], [to_rgb(text.get_color()) for text in axes.texts]])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = np.sort(linear @ [0.2126, 0.7152, 0.0722], axis=0) + 0.05
    assert (luminance[1] / luminance[0]).min() > 4


def test_all_targets_are_checked_before_any_work(run, recipe_file, started, tmp_path, capfd):
    data, wrong = load_recipe(recipe_file).data.directory, tmp_path / "wrong"
    wrong.mkdir()
    assert cli.main(["evaluate", str(run), str(wrong), "--data", data, "--ranks", "1"]) == 2
    assert f"error: {wrong}: neither a run, a checkpoint nor a Hugging Face model" in capfd.readouterr().err
    (wrong / "checkpoints").mkdir()
    assert cli.main(["evaluate", str(run), str(wrong), "--data", data, "--ranks", "1"]) == 2
    assert f"error: {wrong}: checkpoints {wrong}/checkpoints: no checkpoint yet" in capfd.readouterr().err
    other = RunDirectory(tmp_path / "other")
    other.create(load_recipe(recipe_file, ["data.held_out_fraction=0.2"]))
    shutil.copytree(run / "checkpoints", other.checkpoints)
    assert cli.main(["evaluate", str(run), str(other.path)]) == 2
    assert f"error: {other.path}: data.held_out_fraction = 0.2" in capfd.readouterr().err
    assert not started, "nothing was begun"


def test_what_is_complete_is_written_when_a_later_target_ends(run, recipe_file, monkeypatch, tmp_path, capfd):
    """Rank 0 of the first target has written its result; the second one is ended by a signal."""
    starts: list[str] = []

    def start_ranks(_: str, arguments: Sequence[str], *__: object, **___: object) -> int:
        starts.append(arguments[0])
        if len(starts) > 1:
            return 75
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(result(1, [1024])))
        return 0

    monkeypatch.setattr(command, "start_ranks", start_ranks)
    checkpoints = [str(run / "checkpoints" / f"step-0000000{step}") for step in (2, 4, 6)]
    file, words = tmp_path / "found.json", ["--data", load_recipe(recipe_file).data.directory, "--ranks", "1"]
    assert cli.main(["evaluate", *checkpoints, *words, "--json", str(file)]) == 75
    assert starts == checkpoints[:2]
    assert json.loads(file.read_text()) == {"targets": [result(1, [1024])]}
    assert "1 of 3 targets are complete" in capfd.readouterr().out


def test_words_of_an_evaluation_are_taken_as_they_are_meant(run, recipe_file, started, capfd):
    data = load_recipe(recipe_file).data.directory
    for option in ("--json", "--picture"):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", str(run), option, ""])
        assert f"argument {option}: is empty; name a file" in capfd.readouterr().err
    for nothing in ("", ",", " , "):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", str(run), "--tasks", nothing])
        assert "argument --tasks: names no task; name some, such as needle,uuid" in capfd.readouterr().err
    assert cli.main(["evaluate", str(run), "--data", data, "--tasks", "needle, haystack"]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "evaluate.tasks = haystack: there is no such task; name some of automaton, backtrace, common, copy," in said
    assert said.count("automaton") == said.count(" uuid,") == 1, "each name once"
    assert not started


def test_options_that_contradict_each_other_are_refused(run, recipe_file, monkeypatch, tmp_path, capfd):
    calls: list[list[str]] = []
    monkeypatch.setattr(command, "start_ranks", lambda _, arguments, *__, **___: calls.append(arguments) or 75)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    data, one = load_recipe(recipe_file).data.directory, str(tmp_path / "a.png")
    tasks, setting = ["--tasks", "uuid,needle"], "evaluate.tasks=['copy']"
    submitted = ["submit", str(recipe_file), "--nodes", "1", "--weights", str(run)]
    for start in (["evaluate", str(run), "--data", data, "--ranks", "1"], submitted):
        for words, told in (
            ([*tasks, setting], f"--tasks uuid,needle: override {setting!r} chooses tasks too; leave one of them out"),
            (["--json", one, "--picture", one], f"--json {one}, --picture {one}: are one file, which cannot hold both"),
            (
                ["--json", f"{tmp_path}/link/a.png", "--picture", one],
                ": are one file, which cannot hold both; name two files",
            ),
        ):
            assert cli.main([*start, *words]) == 2
            assert told in capfd.readouterr().err
    assert cli.main([*submitted[:-2], "--evaluate", "--judge", str(run)]) == 2
    assert "chooses tokens of the data that all targets read; name these with --data" in capfd.readouterr().err
    begin = ["evaluate", str(run), "--data", data, "--ranks", "1"]
    for below in ("x.json", "new/x.json"):
        assert cli.main([*begin, "--json", f"{tmp_path}/file/{below}"]) == 2
        said = capfd.readouterr().err
        assert f"{tmp_path}/file is not a directory; name a file in a directory" in " ".join(said.split())
    assert cli.main([*begin, "--json", "/sys/kernel/none/x.json"]) == 2
    assert "; name a file where this user may write" in capfd.readouterr().err
    assert not calls and not (tmp_path / "a.png").exists()
    for words in ([*tasks], [setting], ["--json", f"{tmp_path}/a.json", "--picture", one]):
        assert cli.main([*begin, *words]) == 75
    assert len(calls) == 3, "each of them alone is taken"


def test_key_tokens_are_read_as_they_were_written(tmp_path):
    keys = KeyTokens("runs/judge ü", {64: np.arange(128).reshape(2, 64) % 3 == 0, 72: np.ones((1, 72), dtype=bool)})
    keys.save(tmp_path / "keys")
    again = KeyTokens.load(tmp_path / "keys")
    assert again.judge == keys.judge and again.by_length.keys() == keys.by_length.keys()
    assert all((again.by_length[length] == keys.by_length[length]).all() for length in keys.by_length)
