"""`longring topology`: the ranks it starts, its tables and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from longring.launch import cli
from longring.launch.commands.topology import topology_tables
from longring.launch.fit.device import named_device
from longring.parallel.cp.cost import Speed
from longring.parallel.cp.fit import Fit
from longring.parallel.cp.probe import Probe, from_json
from longring.parallel.cp.topology import Fabric, Topology
from rich.console import Console

DEMO = str(Path(__file__).parents[3] / "launch" / "recipes" / "demo.toml")


@pytest.mark.full
def test_two_ranks_of_this_machine(tmp_path, capfd):
    """The ranks are started by torchrun, with the heads of a recipe."""
    file = tmp_path / "topology.json"
    assert cli.main(["topology", DEMO, "--ranks", "2", "--json", str(file), "model.num_kv_heads=1"]) == 0
    printed = capfd.readouterr().out
    assert "4 query and 1 kv heads of 32, float32" in printed
    assert max(map(len, printed.splitlines())) <= 80
    found = from_json(file.read_text())
    assert found.topology.ranks_per_node == 2
    assert found.topology.covers(2)
    # The file is a device for `longring plan`.
    settings = ["model.num_kv_heads=1", "data.max_bucket_tokens=1024"]
    assert cli.main(["plan", DEMO, *settings, "--gpus", "2", "--device", str(file), "--json"]) == 0
    planned = json.loads(capfd.readouterr().out)
    assert planned["device"]["is_gpu"] is False
    assert planned["recipe"]["buckets"][-1]["step_s"] > 0


@pytest.mark.parametrize("arguments", [["--ranks", "1"], [DEMO, "train.ranks_per_node=1"]])
def test_one_rank_has_no_links(arguments, capsys):
    assert cli.main(["topology", *arguments]) == 2
    assert "start two or more, with --ranks 2" in " ".join(capsys.readouterr().err.split())


def test_the_tables_of_a_cluster_fit_80_columns():
    inside = Fabric("switch", 450e9, 1e-5)
    across = Fabric("switch", 50e9, 3e-5, ends_per_port=8, full_duplex=False)
    copies = Fabric("mesh", 40e9, 2e-5)
    found = Probe(
        Topology("probe", 8, inside, across, copies),
        Speed(5e14, 4e14, 2e-5),
        128,
        (Fit(inside, 0.01),),
        (Fit(across, 0.4),),
        9.0,
        (Fit(copies, 0.02),),
    )
    console = Console(width=80, record=True)
    for table in topology_tables(found, "32 query and 8 kv heads of 128, bfloat16", "cuda", named_device("h100")):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for word in (
        "128",
        "450 GB/s",
        "inside, by copies",
        "40 GB/s",
        "copies  mesh",
        "50 GB/s",
        "500,000.0 GFLOP/s",
        "8 ranks a port, one direction at a time",
        "40%",
        "692,300.0 GFLOP/s",
        "80% of the links' bandwidth",
    ):
        assert word in text
