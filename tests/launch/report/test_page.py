"""The page of a run: one file with everything in it, whatever the files of the run hold."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.small_run import append, evaluation, make_run, step_record, task
from longring.data.lock import held
from longring.data.read.batch_order import Trained
from longring.launch import cli
from longring.launch.commands import report as report_module
from longring.launch.config import load_recipe
from longring.launch.fit.start import predicted
from longring.launch.grids.division import division
from longring.launch.metrics import ledger_entry
from longring.launch.report import figures
from longring.launch.report import page as page_module
from longring.launch.report.history import History
from longring.launch.report.picture import draw_run, resume_steps
from longring.launch.report.state import Observer
from matplotlib.figure import Figure

VOID = {"meta", "br", "link", "img", "input", "hr"}
LOADING = {"src", "href", "xlink:href", "data", "srcset", "action", "poster"}


class Page(HTMLParser):
    """The text of a page, after a check of its tags, ids and links."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.ids, self.used, self.words, self.tags = [], [], [], [], []
        self.feed(source)
        assert not self.open, f"not closed: {self.open}"
        assert len(set(self.ids)) == len(self.ids), "an id names one element"
        assert {name.removeprefix("#") for name in self.used} <= set(self.ids), "all links stay within the page"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        links = [str(value) for name, value in attrs if name in LOADING]
        self.used += [link for link in links if not link.startswith("data:image/png;base64,")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page_of(run, *options: str) -> Page:
    assert cli.main(["report", str(run.path), *options]) == 0
    source = run.report_file.read_text()
    assert "@import" not in source
    assert "<script" not in source
    return Page(source)


@pytest.fixture(scope="module")
def run(recipe_file, tmp_path_factory):
    return make_run(recipe_file, tmp_path_factory.mktemp("page") / "run", 12)


def test_a_page_holds_the_run(run):
    page = page_of(run)
    for words in ("of 20, 60.0%", "stopped", "Loss by bucket", "Held-out loss by position", "Gradient norm", "Ledger"):
        assert words in page.text
    assert "train.steps: 10 to 20" in page.text
    assert "gradients are <b>not</b> finite [red]here[/]" in page.text, "shown as it is, not as markup"
    assert "b" not in page.tags[page.tags.index("section") :]
    assert "0.001" in page.text, "the recipe"


def test_a_page_of_files_that_are_damaged_or_absent(recipe_file, tmp_path):
    run = make_run(recipe_file, tmp_path / "run", 0, "data.directory=/nowhere")
    page = page_of(run)
    assert "cannot be read from here: /nowhere/manifest.json" in page.text
    for file in (run.starts_file, run.saves_file, run.events_file, run.evaluation_file):
        file.unlink()
    nan = step_record(1, loss=None, grad_norm=None, outcome="non-finite")
    append(run.metrics_file, nan, {"step": "x"}, {"step": 2}, {"step": 3, "bucket": 64, "tokens": 9, "buckets": [1]})
    run.grids_file.write_text("{")
    page = page_of(run)
    assert "1 non-finite" in page.text
    assert "Loss by bucket" in page.text


def test_the_grids_are_of_starts_that_divided_attention_as_the_last_one(recipe_file, tmp_path):
    run = make_run(recipe_file, tmp_path / "run", 6, "parallel.tokens_per_rank=256")
    alike = division(run.recipe(), 2)
    other = division(run.recipe(["parallel.tensor=2"]), 2)
    grids = {of: [{"sequence_tokens": 512, "window": None, "grid": f"grid {of}"}] for of in (alike, other)}
    append(run.metrics_file, step_record(7, bucket=512, cp=2))
    for entries in (grids, dict(reversed(grids.items()))):
        run.grids_file.write_text(json.dumps(entries))
        text = page_of(run).text
        assert f"grid {alike}" in text and f"grid {other}" not in text
    for damaged in ({alike: [3]}, {alike: [{}]}, {alike: None}, [alike], 3):
        run.grids_file.write_text(json.dumps(damaged))
        assert "grid 2 ranks" not in page_of(run).text


def test_a_picture_of_a_run_that_went_back_behind_an_earlier_start(recipe_file, tmp_path):
    """Its metrics end before the step from which that start went on."""
    run = make_run(recipe_file, tmp_path / "run", 6)
    append(run.starts_file, {"from_step": 5}, {"from_step": 9})
    assert resume_steps(run) == [3, 5, 9]
    draw_run(run, None)
    assert run.picture_file.stat().st_size > 10_000


@pytest.mark.full
def test_a_long_run_has_a_small_page(recipe_file, tmp_path):
    """As many points are drawn for 2,000 steps as for 2,000,000."""
    run = make_run(recipe_file, tmp_path / "run", 2000, "train.steps=2000")
    assert "finished" in page_of(run).text
    assert run.report_file.stat().st_size < 600_000


@pytest.mark.full
def test_a_page_is_written_again_until_the_run_ends(recipe_file, tmp_path, monkeypatch, capsys):
    run = make_run(recipe_file, tmp_path / "run", 4)
    pages, running = [], held(run.lock_file)

    def sleep(seconds: int) -> None:
        pages.append(run.report_file.read_text())
        append(run.metrics_file, step_record(4 + len(pages)))
        if len(pages) == 2:
            running.__exit__(None, None, None)

    monkeypatch.setattr(report_module.time, "sleep", sleep)
    running.__enter__()
    page_of(run, "--follow", "7")
    pages.append(run.report_file.read_text())
    assert ['http-equiv="refresh" content="7"' in page for page in pages] == [True, True, False]
    assert [f"<b>{step}</b>" in page for page, step in zip(pages, (4, 5, 6), strict=True)] == [True] * 3
    assert capsys.readouterr().out.count("saved ") == 3


def test_tasks_are_tables_and_heat_maps(recipe_file, tmp_path):
    """The last evaluation that has tasks is shown, whatever came after it."""
    run = make_run(recipe_file, tmp_path / "run", 12)
    append(run.evaluations_file, evaluation(4) | {"tasks": [task("copy", 64, 1.0), task("copy", 128, 0.25)]})
    append(run.evaluations_file, evaluation(12) | {"by_source": [{"source": "web", "tokens": 64, "loss": 3.25}]})
    text = page_of(run).text
    for words in ("Tasks by length", "after step 4", "copy by depth", "100%", "25%", "loss web 64 3.250"):
        assert words in text
    assert "Gradient norm by part" in text
    assert "layer 0" in text


@pytest.mark.full
def test_several_evaluations_are_drawn_over_time(recipe_file, tmp_path):
    run = make_run(recipe_file, tmp_path / "run", 12)
    append(run.evaluations_file, evaluation(4), evaluation(8), {"step": 9})
    text = page_of(run).text
    assert "Held-out loss by bucket" in text
    assert "Held-out loss by position over time" in text


def test_an_evaluation_that_was_cut_short_is_on_no_curve_of_means(recipe_file, tmp_path):
    """It has no entry of the longest bucket either."""
    run = make_run(recipe_file, tmp_path / "run", 12)
    cut = {key: value for key, value in evaluation(8).items() if key not in ("loss", "unigram_loss", "tokens")}
    cut |= {"buckets": cut["buckets"][:1], "cut_short": "train.evaluate_seconds = 3: passed"}
    append(run.evaluations_file, evaluation(4), cut, {**cut, "step": 20})
    history = History(run)
    history.update()
    for draw in (figures._loss, figures._position_over_time):
        axes = Figure().subplots()
        assert draw(axes, history)
        counts = {line.get_label(): np.size(line.get_xdata()) for line in axes.get_lines()}
        assert next(count for label, count in counts.items() if label in ("held out", "0 to 64")) == 2, draw
    text = page_of(run).text
    assert "evaluations that were not cut short" in text and "the rest train.evaluate_seconds = 3: passed" in text
    assert "at step 12; unigram" in text, "the last whole one"
    assert Observer(run).state().held_out == (12, evaluation(12)["loss"])


def test_a_page_has_the_ledger_of_what_is_trained(recipe_file, tmp_path):
    """The cells of trained.json are rows; a file that is damaged leaves the table out."""
    run = make_run(recipe_file, tmp_path / "run", 12)
    cells = [
        Trained(source="[red]web[/]", length=64, sequences=30, available=20),
        Trained(source="books", length=512, sequences=5, available=15),
    ]
    run.trained_file.write_text(json.dumps({"step": 12, "cells": [ledger_entry(cell) for cell in cells]}))
    text = page_of(run).text
    assert "Trained by source and bucket, up to step 12" in text
    assert "[red]web[/] 64 14.3% 1,920 42.9% 1.50 640 0" in text
    assert "books 512 85.7% 2,560 57.1% 0.33 0 5,120" in text
    for damaged in ("{", "[]", '{"step": 1, "cells": [{"source": "web"}]}', '{"step": 1, "cells": [3]}'):
        run.trained_file.write_text(damaged)
        assert not page_module._trained(History(run))


@pytest.mark.full
def test_the_time_that_a_start_has_predicted_stands_beside_the_measured_one(recipe_file, tmp_path):
    run = make_run(recipe_file, tmp_path / "run", 12)
    assert "planned ms" not in page_of(run).text, "a CPU has no data sheet"
    recipe = load_recipe(recipe_file, ["train.dtype=bfloat16"])
    plan = predicted(recipe, 4, 500, "NVIDIA H100 80GB HBM3", recipe.lengths)
    assert all(entry["step_s"] and entry["memory_bytes"] for entry in plan.values())
    assert {entry["step_s"] for entry in predicted(recipe, 4, 500, None, recipe.lengths).values()} == {None}
    append(run.starts_file, {"from_step": 12, "world_size": 4, "predicted": plan | {512: {"step_s": 1.234}}})
    assert "planned ms" in page_of(run).text
    assert "1,234" in page_of(run).text
    for damaged in (3, {"512": 3}, {"x": {"step_s": 1}}, {"512": {}}):
        append(run.starts_file, {"from_step": 12, "predicted": damaged})
        assert "planned ms" not in page_of(run).text


@pytest.mark.full
def test_predicted_memory_stands_beside_the_measured_peak(recipe_file, tmp_path):
    run = make_run(recipe_file, tmp_path / "run", 6)
    kinds = {"weights": 2**30, "activations": 3 * 2**29, "reserve": 2**31, "host": 2**28}
    plan = {"64": {"memory_bytes": 1, "kinds_bytes": {}}, "512": {"memory_bytes": 9 * 2**29, "kinds_bytes": kinds}}
    append(run.starts_file, {"from_step": 3, "world_size": 2, "predicted": plan})
    append(run.metrics_file, *(step_record(step) | {"memory": {"peak_gib": step / 4}} for step in (7, 8, 9)))
    text = page_of(run).text
    assert "weights 1.00 activations 1.50 reserve 2.00" in text
    assert "predicted, of tensors 2.50 predicted, of all 4.50 measured, of tensors 2.25" in text
    assert "predicted, on the host 0.25" in text
