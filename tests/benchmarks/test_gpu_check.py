"""Sections of gpu_check.py: their limits suffice for what they ask, and their tables and bars tell what is right."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import cp_virtual
import gpu_check
import pytest
import torch
from lib import gpu_backends, gpu_step_cases
from lib.cases import layout_of
from lib.gpu_kernels import MARGIN_S
from lib.gpu_step_cases import SIZES, cases, first_levels, flops_of, predicted
from lib.script import help_text
from lib.sections import LIMIT, NO_TIME
from lib.timing import CASE_S
from longring.kernels.mask import make_mask
from rich.console import Console

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
CPU = torch.device("cpu")
FLOPS = {"forward": 300e12, "continued": 300e12, "backward": 200e12}
"""FLOP/s of attention that the limits are made for: not measured."""
PRODUCT_FLOPS = 500e12
"""FLOP/s of other products that the limits are made for: not measured."""
GROUP_S = 540
"""Time limits of the sections of one command: of ten minutes the machine's start and the processes take one."""


def limits(folder: Path) -> dict[str, float]:
    return {section.name: section.seconds for section, _ in gpu_check.sections(folder, "cuda", "full")}


def test_the_named_groups_have_all_sections_and_end_in_time(tmp_path):
    seconds, text = limits(tmp_path), help_text(gpu_check.__doc__ or "")
    groups = [(names.split(","), int(told)) for names, told in re.findall(r"    --only (\S+) +(\d+) s", text)]
    assert sorted(name for names, _ in groups for name in names) == sorted(seconds)
    for names, told in groups:
        assert sum(seconds[name] for name in names) == told <= GROUP_S


@pytest.mark.parametrize("document", ["slurm/README.md", "docs/slurm-first-time.md"])
def test_the_documented_job_is_long_enough_for_all_sections(tmp_path, document):
    text = (Path(gpu_check.__file__).parents[1] / document).read_text()
    [minutes] = re.findall(r"--time=(\d+) \.venv/bin/python benchmarks/gpu_check\.py", text)
    assert 60 * int(minutes) > sum(limits(tmp_path).values())


def test_attention_of_tiles_fits_their_limit(tmp_path):
    """At the assumed FLOP/s, in the least number of rounds, with a round of `CASE_S` more."""
    trials, seconds = cp_virtual.trials("cuda", "full"), 0.0
    for trial in trials:
        assert [member for member in trial.members if trial.unfit(member)] == []
        whole, case = layout_of(trial.case), trial.case
        pairs = make_mask(whole, whole, window=trial.visibility.window, device=CPU).num_pairs
        one = sum(
            2 * gpu_backends.PRODUCTS[task] * case.head_dim * case.heads * pairs / FLOPS[task]
            for task in ("forward", "backward")
        )
        seconds += cp_virtual.num_passes(len(trial.members), "cuda") * one + CASE_S
    assert {trial.size for trial in trials} == {2, 4, 8, 16}
    assert {trial.case.tokens for trial in trials} == {2**17, 2**18, 2**19, 2**20}
    assert 60 < seconds < limits(tmp_path)["tiles"] - MARGIN_S - 60, "a minute for kernels and the choice among them"


def test_attention_of_all_backends_fits_their_limit(tmp_path):
    calls, least_s = 5, 0.05  # of `choose.measure`: two and at least three, and those three for TIMED_S
    num_backends = len(gpu_backends.BACKENDS) - len({"reference", "torch_cpu"})
    seconds = 0.0
    for question in gpu_backends.questions("cuda", "full"):
        for sample in question.samples:
            pairs = sample.mask(CPU).num_pairs * sample.batch * question.num_heads
            for task in sample.tasks:
                flops = 2 * gpu_backends.PRODUCTS[task] * question.head_dim * pairs
                seconds += max(least_s, calls * flops / FLOPS[task])
    assert 60 < num_backends * seconds < limits(tmp_path)["backends"] - MARGIN_S - 60, "a minute for compiling"


def test_steps_fit_their_limit_and_the_first_level_that_fits_is_seen(tmp_path):
    sizes, on_80_gb, seconds = SIZES["full"], list[dict](), 0.0
    assert sizes.lengths == (8192, 32_768, 131_072)
    for case in cases(sizes):
        fits = predicted(sizes, case, on_gpu=True).total <= 80e9
        row = {"part": "micro-batch", "length": case.length, "kept": case.kept}
        on_80_gb.append({**row, "fits": fits, "predicted_to_fit": fits})
        products, attention = flops_of(sizes, case.length)
        # Of attention's FLOPs a third are forward; the backward computes the scores again.
        micro_batch_s = products / PRODUCT_FLOPS + attention / 3 * (1 / FLOPS["forward"] + 2.5 / FLOPS["backward"])
        timed = min(3, 1 + 3 // micro_batch_s)
        seconds += (1 + timed) * micro_batch_s if fits else micro_batch_s
    levels = {8192: ("keep", "keep"), 32_768: ("keep", "keep"), 131_072: ("recompute_layer", "recompute_layer")}
    assert first_levels(on_80_gb) == levels
    assert 60 < seconds < limits(tmp_path)["step"] - 180, "for the start, kernels, a start's measurement, whole steps"


def step_rows() -> list[dict]:
    """Return rows as of a device of 80 GB, on which one case fits against the prediction."""
    sizes, rows = (
        SIZES["full"],
        [{"part": "start of DeepSpeed and the mesh", "ms": 20_000.0, "note": "1.34B parameters"}],
    )
    for case in cases(sizes):
        plan = predicted(sizes, case, on_gpu=True)
        row = {"part": "micro-batch", "length": case.length, "kept": case.kept, "attention": "fastest"}
        row |= {"predicted_bytes": plan.total, "predicted_to_fit": plan.total <= 80e9}
        if fits := row["predicted_to_fit"] or (case.kept == "recompute_mlp"):
            row |= {"ms": 19_534.1, "host_ms": 345.6, "tokens_per_s": 131_072.0, "mfu": 0.412, "peak_bytes": 7 * 10**10}
            row |= {"bytes_a_token": 1_234_567}
        rows.append({**row, "fits": fits})
    whole = {
        "part": "whole step",
        "length": 8192,
        "kept": "keep",
        "ms": 1500.0,
        "host_ms": 1.5,
        "tokens_per_s": 43_690.7,
    }
    return [
        *rows,
        *({**whole, "fits": True, "attention": name, "mfu": mfu} for name, mfu in (("auto", 0.41), ("fastest", 0.52))),
    ]


def printed(show, rows: list[dict]) -> str:
    """Return what is printed at 80 columns."""
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    show(rows, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_the_table_of_steps_is_whole_at_80_columns():
    text = printed(gpu_step_cases.show, step_rows())
    assert all(word in text for word in ("131,072", "19,534", "1,235", "no fit", "0.412", "157.6", "recompute_layer "))
    assert "131,072 tokens: first level that fits: recompute_mlp; plan: recompute_layer" in text
    assert "whole step at 8,192 tokens: MFU at least 0.5: 0.520 met" in text


def test_a_level_without_time_leaves_the_first_that_fits_open():
    rows = step_rows()
    [late] = (row for row in rows if row.get("length") == 131_072 and row["kept"] == "offload")
    for column in late.keys() - {"part", "length", "kept", "attention"}:
        del late[column]
    late["note"] = NO_TIME
    assert list(first_levels(rows)) == [8192, 32_768]
    assert "no time" in printed(gpu_step_cases.show, rows)


def test_a_step_below_its_bar_or_without_a_peak_is_seen():
    *_, plain, fastest = step_rows()
    assert [bar["met"] for bar in gpu_step_cases.bars([plain])] == ["not met"]
    assert [bar["met"] for bar in gpu_step_cases.bars([plain, fastest])] == ["met"]
    assert [bar["met"] for bar in gpu_step_cases.bars([{**plain, "length": 4096}])] == ["no row"]
    del fastest["mfu"]
    assert [bar["met"] for bar in gpu_step_cases.bars([fastest])] == ["no row"]


def rows_without_memory() -> dict[str, dict]:
    """Return rows of steps that fit, that do not although or as predicted, and of a measurement that fails."""
    sys.path.append(BENCHMARKS)
    from lib import gpu_step

    sizes = gpu_step.sizes_here("smallest")
    ready = gpu_step.make_ready(sizes, sizes.lengths)
    case = cases(sizes)[-1]

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = {"whole": gpu_step.whole_step_row(ready, case), "fits": gpu_step.bucket_row(ready, case)}
    both_passes = gpu_step.Ready.both_passes
    gpu_step.Ready.both_passes = fail  # type: ignore
    found |= {"against": gpu_step.bucket_row(ready, case), "step": gpu_step.whole_step_row(ready, case)}
    gpu_step.predicted_to_fit = lambda ready, case: False
    found["as predicted"] = gpu_step.bucket_row(ready, case)
    gpu_step.with_backends = fail
    none, found["measurement"] = gpu_step.with_fastest(ready)
    assert none is None
    os.environ[LIMIT] = "0"
    gpu_step.make_ready, gpu_step.Ready.both_passes = lambda *_: ready, both_passes  # type: ignore
    found["late"] = list(gpu_step.step_rows("smallest"))[-1]
    return found


@pytest.mark.full
def test_only_memory_that_was_predicted_to_suffice_is_an_error(on_ranks):
    [rows] = on_ranks(1, rows_without_memory)
    known = {"length": 128, "kept": "recompute_layer in tiles", "attention": "auto"}
    assert all(rows[name].items() >= known.items() for name in rows.keys() - {"measurement", "late"})
    assert all(rows[name]["fits"] and rows[name]["ms"] > 0 for name in ("whole", "fits"))
    assert rows["whole"]["micro_batches"] == 2 and rows["whole"]["tokens_per_s"] > 0
    assert not rows["against"]["fits"] and rows["against"]["right"] is False
    assert "against the prediction" in rows["against"]["note"]
    assert not rows["as predicted"]["fits"] and "right" not in rows["as predicted"]
    assert rows["step"]["right"] is False
    assert rows["late"]["note"] == NO_TIME and "right" not in rows["late"]
    assert rows["measurement"]["right"] is False and "OutOfMemoryError" in rows["measurement"]["note"]


def backend_rows(times: dict[str, tuple[float, float]]) -> list[dict]:
    """Return rows of causal tiles of 8,192 and 32,768 tokens, which take the given ms."""
    known = {"task": "forward", "mask": "causal", "heads": 8, "kv_heads": 8, "note": ""}
    return [
        {**known, "backend": name, "tokens": tokens, "ms": ms, "tflops": tokens**2 / ms}
        for name, both in times.items()
        for tokens, ms in zip((8192, 32_768), both, strict=True)
    ]


def test_the_choice_for_all_lengths_is_compared_with_the_best_of_each():
    def forward(times: dict[str, tuple[float, float]]) -> dict[tuple[str, str], tuple[float | None, str]]:
        found = zip(gpu_backends.BARS, gpu_backends.bars(backend_rows(times)), strict=True)
        return {(bar.backend, bar.over): (row["value"], row["met"]) for bar, row in found if bar.task == "forward"}

    # triton is the fastest in the sum, and takes twice the time of flash_3 at 8,192 tokens.
    found = forward({"triton": (2.0, 10.0), "cudnn": (1.6, 12.0), "flash_3": (1.0, 16.0)})
    assert found["chosen", "flash_3"] == (0.5, "not met") == found["chosen", "best"]
    assert found["triton", "cudnn"] == (0.8, "met")
    found = forward({"triton": (2.0, 10.0), "flash_3": (1.0, 8.0)})
    assert found["chosen", "flash_3"] == (1.0, "met") == found["chosen", "best"]
    assert found["triton", "cudnn"] == (None, "no row")
    # A backend that fails at one length is not chosen.
    rows = backend_rows({"triton": (2.0, 10.0), "flash_3": (1.0, 8.0)})
    rows[-1] |= {"ms": None, "tflops": None}
    assert [row["value"] for row in gpu_backends.bars(rows)][:3:2] == [0.5, 0.5]
    assert "NO" in printed(gpu_backends.show, rows)
    assert {bar["met"] for bar in gpu_backends.bars([])} == {"no row"}


def test_a_record_without_a_directory_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.sys, "argv", ["gpu_check.py", "--only", "none", "--json", f"{tmp_path}/none/x.json"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert f"there is no directory {tmp_path}/none" in " ".join(capsys.readouterr().err.split())
