"""`--json` of `prepare`, `inspect` and `plan`: what their tables say, as numbers."""

from __future__ import annotations

import json

import pytest
from longring.data.format.manifest import open_prepared
from longring.launch import cli
from longring.launch.config import load_recipe


def printed(capsys, *arguments: str):
    assert cli.main(list(arguments)) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.full
def test_prepared_and_inspected_data(capsys, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a picture would be drawn here
    recipe = load_recipe(recipe_file)
    manifest = open_prepared(recipe.data.directory)
    prepared = printed(capsys, "prepare", str(recipe_file), "--json")
    assert prepared["ledger"]["records"] == manifest.ledger.records
    assert {b["length"]: b["sequences"] for b in prepared["buckets"]} == {
        bucket.length: bucket.sequences for bucket in manifest.buckets("train")
    }
    inspected = printed(capsys, "inspect", str(recipe_file), "--json")
    assert inspected["verified"]
    assert not inspected["mix_is_renewed"]
    assert {key: inspected[key] for key in ("directory", "bytes", "ledgers")} == {
        key: prepared[key] for key in ("directory", "bytes", "ledgers")
    }
    trained = sum(cell["sequences"] * cell["length"] for cell in inspected["mix"])
    assert trained == recipe.train.steps * recipe.train.global_batch_tokens
    assert 0 < inspected["attention_share"] < 1
    assert inspected["flops_of_one_length"] > 1
    assert printed(capsys, "inspect", recipe.data.directory, "--json")["steps"] == 1000
    assert list(tmp_path.iterdir()) == []


def test_the_grids_of_a_plan(capsys, recipe_file):
    arguments = ["plan", str(recipe_file), "parallel.tokens_per_rank=128", "--topology", "full_mesh"]
    found = printed(capsys, *arguments, "--json")
    assert [(grid["sequence_tokens"], grid["cp"]) for grid in found["grids"]] == [(256, 2), (512, 4)]
    for grid in found["grids"]:
        assert grid["layer_s"] <= 1.01 * min(other["layer_s"] for other in grid["others"])
    assert cli.main([*arguments, "--json", "--mix", "mix.png"]) == 2
    assert "prints the grids alone; leave out --timeline, --measure and --mix" in " ".join(
        capsys.readouterr().err.split()
    )


def test_json_of_a_part_is_refused(capsys, recipe_file):
    assert cli.main(["prepare", str(recipe_file), "--json", "--part", "0/2"]) == 2
    assert "prints the whole data once it is prepared; leave out --slurm and --part" in " ".join(
        capsys.readouterr().err.split()
    )
    printed(capsys, "prepare", str(recipe_file), "--json")
