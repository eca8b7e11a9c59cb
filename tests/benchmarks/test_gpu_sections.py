"""Sections of gpu_check and gpu_node: they see what is wrong. Their whole runs are in test_gpu_programs.py."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from gpu_node import REPORT_S, judged, sections
from helpers.plain_attention import answers, visible_pairs
from lib.definition import NAMES, by_definition, error_ratio, visible
from lib.gpu_training import EXACT, LOST, equal_rows, is_whole
from lib.sections import Result
from lib.trace import covered, kind_of, length
from longring.kernels.layout import SeqLayout
from longring.launch.flops import peak_flops
from longring.parallel.world import World

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def test_the_documented_job_is_long_enough_for_sections_that_all_hang(tmp_path):
    together = sections(tmp_path, World(0, 8, 0, 8, "localhost", 1, hosted=True), "cuda", "full", None)
    needed = sum(section.seconds + REPORT_S for section in together)
    commands = (Path(BENCHMARKS).parent / "slurm" / "README.md").read_text().split("```bash")
    [minutes] = [re.findall(r"--exclusive --time=(\d+)", text) for text in commands if "gpu_node.py --json" in text]
    assert len(minutes) == 2 and all(60 * int(limit) >= needed for limit in minutes)


@pytest.mark.parametrize(("starts", "window"), [((0,), None), ((0, 3, 9), None), ((0,), 4)])
def test_the_definition_is_that_of_the_tests(starts, window):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn((1, 17, heads, 8), generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))
    whole = SeqLayout(((0, 17),), starts)
    pairs = visible(17, starts, window, torch.device("cpu"))
    assert torch.equal(pairs, visible_pairs(whole, whole, True, window))
    found = by_definition((q, k, v, dout), pairs, torch.float64)
    _, exact = answers([q, k, v], dout, pairs)
    for name in NAMES:
        torch.testing.assert_close(found[name], exact[name])


def test_an_error_of_a_few_rows_or_nan_is_above_the_limit():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn((1, 64, heads, 16), generator=generator).bfloat16() for heads in (4, 2, 2, 4)]
    seen = visible(64, (0,), None, torch.device("cpu"))
    exact, plain = (by_definition(tensors, seen, dtype) for dtype in (torch.float64, torch.bfloat16))
    rows = torch.arange(32, 64)
    got = {name: x[:, rows] for name, x in plain.items()}
    ratio, _ = error_ratio(got, plain, exact, rows)
    assert ratio == 0.5, "plain PyTorch has half of what is allowed"
    for wrong in (torch.nan, 1.0):
        other = got | {"dk": got["dk"].clone()}
        other["dk"][:, -1] += wrong
        ratio, name = error_ratio(other, plain, exact, rows)
        assert name == "dk" and ratio > 1


def rows_of_ranks(wrong: bool) -> dict[str, list[dict]]:
    """Run the sections of several ranks on this rank; with `wrong`, attention loses the last token's result."""
    sys.path.append(BENCHMARKS)
    import lib.gpu_ranks as ranks
    from lib.sections import LIMIT

    os.environ[LIMIT] = "120"
    if wrong:
        right = ranks.context_attention
        ranks.context_attention = lambda q, k, v, spec, group: right(q, k * 1.05, v, spec, group)
        return {"order": list(ranks.order_rows("smallest"))}
    import lib.gpu_gradients as gradients
    import lib.gpu_links as links

    return {
        "order": list(ranks.order_rows("smallest")),
        "memory": list(ranks.memory_rows("smallest")),
        "channels": list(links.channel_rows("smallest")),
        "overlap": list(links.overlap_rows("smallest")),
        "gradients": list(gradients.gradient_rows("smallest")),
    }


@pytest.mark.full
def test_sections_of_ranks_yield_rows_on_rank_0_alone(on_ranks):
    first, second = on_ranks(2, rows_of_ranks, False)
    assert not any(second.values())
    assert {row["right"] for row in first["order"]} == {True} and len(first["order"]) >= 4
    stages = ["ranks joined", "communicators opened and connected", "attention over 2 ranks"]
    assert [row["after"].lstrip("0123456789 ") for row in first["memory"]] == stages
    assert first["channels"][-1]["channel"] == "all channels at once" and len(first["channels"]) > 4
    assert [row for row in first["overlap"] if not (0 <= row["covered"] <= 1 and row["communication_ms"] > 0)] == []
    assert [row["zero_stage"] for row in first["gradients"]] == [1, 2]


@pytest.mark.full
def test_wrong_attention_is_seen_in_every_grid(on_ranks):
    [rows] = on_ranks(2, rows_of_ranks, True)[:1]
    assert {row["right"] for row in rows["order"]} == {False}


def rows_of_two_nodes() -> list[dict]:
    """Run the section of the channels on this rank of two nodes of two."""
    sys.path.append(BENCHMARKS)
    from lib.gpu_links import channel_rows
    from lib.sections import LIMIT

    os.environ.update({LIMIT: "120", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(int(os.environ["RANK"]) % 2)})
    return list(channel_rows("smallest"))


@pytest.mark.full
def test_a_ring_inside_a_node_is_timed_on_shared_and_on_own_communicators(on_ranks):
    rows = on_ranks(4, rows_of_two_nodes)[0]
    found = dict.fromkeys((row["ring"], row["communicators_over"]) for row in rows)
    assert list(found) == [(4, 4), (2, 4), (2, 2)]
    assert {row["channel"] for row in rows} >= {"keys up", "keys down", "all channels at once"}
    assert all(row["GB_per_s"] > 0 for row in rows)


def test_ranks_that_are_left_may_end_by_an_error_or_by_the_thread_of_nccl():
    assert {75, -6} <= LOST and not {0, 1, 2, 70, 137, -9, -15, None} & LOST


def test_a_rank_without_a_report_has_failed():
    done = {"section": "order", "status": "done", "seconds": 1.0, "note": ""}
    result = Result([{"right": True}], done)
    assert judged(result, {0: done, 1: done}, 2).right
    silent = judged(result, {0: done}, 2)
    assert not silent.right and silent.section["status"] == "no report" and "rank 1" in silent.section["note"]
    failed = judged(result, {0: done, 2: {**done, "status": "failed", "note": "why"}}, 3)
    assert failed.section["status"] == "failed" and failed.section["note"] == "2 ranks are not done; rank 2: why"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H20", None),
        ("NVIDIA L4", None),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_form(name, peak):
    assert peak_flops(name) == peak


def test_lengths_of_intervals_count_overlaps_once():
    assert length([(0, 2), (1, 3), (5, 6)]) == 4
    assert length([]) == 0
    assert covered([(0, 2), (4, 6)], [(1, 5)]) == 0.5
    assert covered([(0.1, 0.2)], [(0.3, 0.7)]) == 0, "rounding leaves no negative share"
    assert covered([(1, 2)], [(0, 3)]) == covered([], [(0, 3)]) == 1
    kinds = [kind_of(name, "cuda") for name in ("ncclDevKernel_SendRecv", "Memcpy PtoP", "Memset", "attention_forward")]
    assert kinds == ["communication", "communication", None, "compute"]


def test_steps_that_are_missing_or_not_finite_are_seen():
    steps = [{"step": step, "outcome": "good", "loss": 1.0} for step in (1, 2, 3)]
    assert is_whole(steps, 3)
    assert not is_whole(steps, 4)
    assert not is_whole([*steps[:2], {**steps[2], "loss": None}], 3)
    assert not is_whole([*steps[:2], {**steps[2], "outcome": "non-finite"}], 3)
    assert not is_whole([*steps, steps[2]], 3)


def test_a_step_that_differs_after_a_resume_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name, loss in (("run", 2.0), ("again", 2.0000001)):
        (tmp_path / name).mkdir()
        steps = [dict.fromkeys(EXACT, 0.0) | {"step": step} for step in (1, 2)]
        steps[1]["loss"] = loss
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    run, again = str(tmp_path / "run"), str(tmp_path / "again")
    [row] = equal_rows(run, run, 1, 2)
    assert row["right"]
    [row] = equal_rows(run, again, 1, 2)
    assert not row["right"] and row["note"] == "step 2, loss: 2.0 and 2.0000001"
    [row] = equal_rows(run, run, 2, 3)
    assert not row["right"] and row["note"] == "step 3: is missing"
