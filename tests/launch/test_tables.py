"""Tables are whole at 80 columns: a cell that does not fit continues on the next line."""

from __future__ import annotations

import io
import json

import pytest
from helpers.small_checkpoint import make_checkpoint
from longring.data.read.batch_order import Trained
from longring.launch.commands.checkpoints import list_checkpoints
from longring.launch.commands.plan import plan
from longring.launch.config import load_recipe
from longring.launch.metrics import trained_table
from longring.launch.tables import plain_table
from rich.console import Console
from rich.table import Table


def printed(table: Table) -> str:
    """Return the text of a table on a terminal of 80 columns."""
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def cells(text: str) -> str:
    """Return all characters of a text except spaces, after a check that it fits 80 columns."""
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    return "".join(text.split())


def test_a_cell_that_does_not_fit_is_folded():
    table = plain_table("Title", "figure", "text", left=["text"])
    table.add_row("9" * 100, "z" * 100)
    text = cells(printed(table))
    assert text.count("9") == 100
    assert text.count("z") == 100


def test_title_and_caption_of_a_narrow_table_are_lines():
    title, caption = "Memory of a rank, bucket 1,048,576, at its peak in the backward", "c d " * 15 + "e\nf"
    table = plain_table(title, "kind", "GiB", caption=caption)
    table.add_row("weights", "1.5")
    first, *_, before, last = (line.rstrip() for line in printed(table).splitlines())
    assert (first, before, last) == (title, *caption.splitlines())


def test_the_tokens_of_a_long_run():
    rows = [
        Trained(source=source, length=2**power, sequences=10**15 >> power, available=10**15 >> power)
        for power in range(11, 18)
        for source in ("web", "a-source-with-a-long-name")
    ]
    text = cells(printed(trained_table(rows)))
    assert text.count("9") >= 7 * 2 * 7


def test_the_checkpoints_of_a_long_run(tmp_path, capsys):
    make_checkpoint(tmp_path, 12_345_678)
    (tmp_path / "step-12345679.partial").mkdir()
    console = Console(width=80)
    settings = {"verify": False, "prune": False, "keep_last": 1, "keep_every_steps": 0}
    assert list_checkpoints(tmp_path, console, **settings) == 0
    text = capsys.readouterr().out
    assert "2 / tensor 1, ZeRO 1" in text
    assert "…" not in text
    assert list_checkpoints(tmp_path, console, **settings, as_json=True) == 0
    whole, partial = json.loads(capsys.readouterr().out)
    assert (whole["step"], whole["state"], whole["world_size"], whole["zero_stage"]) == (12_345_678, "whole", 2, 1)
    assert (partial["step"], partial["state"], partial["bytes"]) == (12_345_679, "partial", None)


@pytest.mark.full
def test_the_plan_of_seven_buckets(recipe_file, capsys):
    settings = ["data.min_bucket_tokens=64", "data.max_bucket_tokens=4096", "train.global_batch_tokens=8192"]
    recipe = load_recipe(recipe_file, [*settings, "parallel.tokens_per_rank=64", "parallel.cp.topology=full_mesh"])
    plan(recipe, Console(width=80))
    text = capsys.readouterr().out
    assert "4,096 64 full" in " ".join(text.split())
    cells(text)
