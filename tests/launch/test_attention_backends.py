"""The backends of a run: measured by rank 0 in processes of their own, kept on disk, and the same on all ranks."""

from __future__ import annotations

import io
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from longring.kernels import backends
from longring.kernels.backends import BACKENDS
from longring.kernels.case import Case
from longring.kernels.choose import Timing, tiles_of
from longring.launch import attention_backends
from longring.launch.attention_backends import (
    FILE,
    backends_table,
    measured,
    measured_apart,
    question_of,
    with_backends,
)
from longring.launch.config import Recipe, load_recipe
from longring.launch.measure_backend import question_from, question_json
from longring.parallel.mesh import Mesh, join
from rich.console import Console

CPU = torch.device("cpu")
CASE = Case("cpu", "interpreter", torch.float32, 16, 2, False)


def small_recipe(file: Path, *overrides: str) -> Recipe:
    return load_recipe(file, [*overrides])


def test_the_tiles_of_a_run_have_its_batches_windows_and_shares(sandbox_recipe):
    question = question_of(small_recipe(sandbox_recipe), [64, 512, 1024])
    assert question[:4] == (4, 2, 16, torch.float32)
    tiles = tiles_of(question, CPU)
    assert list(tiles) == [
        ("forward", "causal"), ("backward", "causal"), ("continued", "causal"), ("continued", "whole"),
        ("backward", "whole"),
    ]  # fmt: skip
    causal = [question.samples[number] for number in tiles["backward", "causal"]]
    assert [(x.batch, x.queries.num_tokens) for x in causal] == [(8, 64), (1, 512), (1, 512)]
    [whole] = (question.samples[number] for number in tiles["continued", "whole"])
    assert (whole.queries.num_tokens, whole.keys.num_tokens) == (256, 256)
    pattern = ('model.layer_pattern=["window", "full"]', "model.window_tokens=100", "data.method=best_fit")
    tiles = tiles_of(question_of(small_recipe(sandbox_recipe, *pattern), [512, 1024]), CPU)
    assert {("forward", "window"), ("continued", "documents"), ("forward", "documents")} <= set(tiles)
    assert question_from(question_json(question)) == question


@pytest.fixture
def sandbox_recipe(tmp_path) -> Path:
    """A recipe whose data are never read."""
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'run_directory = "{tmp_path}/run"\n[data]\ndirectory = "{tmp_path}/data"\nmin_bucket_tokens = 64\n'
        f'max_bucket_tokens = 1024\nsource = {{ kind = "json", path = "{tmp_path}/texts" }}\n'
        "[model]\nnum_layers = 2\nhidden_size = 64\nnum_heads = 4\nnum_kv_heads = 2\nffn_hidden_size = 96\n"
        '[parallel]\ntokens_per_rank = 512\n[train]\ndtype = "float32"\nsteps = 20\nglobal_batch_tokens = 2048\n'
        "learning_rate = 3e-3\nmin_learning_rate = 1e-3\nwarmup_steps = 4\n"
    )
    return file


@pytest.fixture
def asked(monkeypatch, caplog) -> list[str]:
    """The backends that are measured: "torch_cpu" takes 2 s, "flash" 1 s, and "triton" ends its process."""
    asked: list[str] = []
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(attention_backends, "machine_of", lambda device: json.dumps({"device": "A", "torch": "2.13"}))
    for name in BACKENDS:
        fits = name in ("torch_cpu", "triton", "flash", "reference")
        unfit = (lambda case: None) if fits else (lambda case: "is not installed")
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(unfit=unfit))

    def measure_apart(question, name, device, seconds):
        asked.append(name)
        if name == "triton":
            return [Timing("forward", "causal", 0, name, 0.5, "")], "its process ended with -11: nothing on stderr"
        return [Timing("forward", "causal", 0, name, {"torch_cpu": 2.0, "flash": 1.0}[name], "")], ""

    monkeypatch.setattr(attention_backends, "measured_apart", measure_apart)
    return asked


def test_what_was_measured_is_kept_for_this_machine_and_question(monkeypatch, caplog, asked, sandbox_recipe, tmp_path):
    question, file = question_of(small_recipe(sandbox_recipe), [512]), tmp_path / "triton" / FILE
    first = measured(question, CASE, CPU, file)
    assert [(timing.backend, timing.seconds) for timing in first] == [("torch_cpu", 2.0), ("flash", 1.0)]
    assert asked == ["torch_cpu", "triton", "flash"], "not reference, and none that does not fit"
    assert "attention backend flash_4: is not installed" in caplog.text
    assert "attention backend triton does not count: its process ended with -11" in caplog.text
    assert measured(question, CASE, CPU, file) == first and len(asked) == 3
    # Another question, then another version, then another device, which does not displace the first.
    measured(question_of(small_recipe(sandbox_recipe), [64]), CASE, CPU, file)
    assert len(asked) == 6
    for number, name in enumerate("AB", 3):
        machine = json.dumps({"device": name, "torch": "2.14"})
        monkeypatch.setattr(attention_backends, "machine_of", lambda device, machine=machine: machine)
        assert measured(question, CASE, CPU, file) == first
        assert len(asked) == 3 * number
    assert [json.loads(machine) for machine in json.loads(file.read_text())] == [
        {"device": "A", "torch": "2.14"}, {"device": "B", "torch": "2.14"}
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", '{"not json": {}}', '{"{}": {}}'])
def test_a_damaged_record_is_measured_again(asked, sandbox_recipe, tmp_path, caplog, text):
    question, file = question_of(small_recipe(sandbox_recipe), [512]), tmp_path / FILE
    file.write_text(text)
    assert len(measured(question, CASE, CPU, file)) == 2
    assert "cannot be read" in caplog.text
    assert measured(question, CASE, CPU, file) and len(asked) == 3


@pytest.mark.parametrize("backend", ["torch_cpu", "flash"])
def test_a_measurement_that_was_cut_off_or_failed_for_the_default_is_not_kept(
    monkeypatch, asked, sandbox_recipe, tmp_path, backend
):
    note = "its process ended with 1: out of memory" if backend == "torch_cpu" else "no end within 3 s"
    monkeypatch.setattr(attention_backends, "measured_apart", lambda _, name, *__: ([], note * (name == backend)))
    assert measured(question_of(small_recipe(sandbox_recipe), [512]), CASE, CPU, tmp_path / FILE) == []
    assert not (tmp_path / FILE).exists()


@pytest.mark.full
def test_a_backend_is_measured_in_a_process_of_its_own(sandbox_recipe):
    recipe = small_recipe(sandbox_recipe, "parallel.tokens_per_rank=64")
    found, note = measured_apart(question_of(recipe, [64]), "torch_cpu", CPU, 120)
    assert note == "" and [(x.task, x.kind, x.note) for x in found] == [
        ("forward", "causal", ""), ("backward", "causal", "")
    ]  # fmt: skip
    assert all(timing.seconds for timing in found)
    # A process that ends by itself before it has measured.
    assert measured_apart(question_of(recipe, [64]), "absent", CPU, 120) == (
        [], "its process ended with 1: KeyError: 'absent'"
    )  # fmt: skip
    assert measured_apart(question_of(recipe, [64]), "torch_cpu", CPU, 0.01) == ([], "no end within 0 s")


def decided(recipe_file: Path, folder: Path) -> list[str]:
    """Return what this rank takes: if rank 1 lacks what rank 0 has chosen, and if it has it; with what it rehearses."""
    recipe, taken = load_recipe(recipe_file), list[str]()
    mesh: Mesh = join(recipe.parallel, 1)
    on_gpu = replace(mesh, device=torch.device("cuda"))
    attention_backends.architecture = lambda device: "sm_90"
    attention_backends.rehearse = lambda question, backend, device: taken.append(backend)
    attention_backends.measured = lambda *_: [
        Timing("forward", "causal", 0, "triton", 2.0, ""),
        Timing("forward", "causal", 0, "flash_4", 1.0, ""),
        Timing("backward", "causal", 0, "triton", 1.0, ""),
        Timing("backward", "causal", 0, "flash_4", None, "dq differs"),
    ]
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    for lacking in (1, None):
        reason = "is not installed" if mesh.rank == lacking else None
        BACKENDS["flash_4"] = BACKENDS["flash_4"]._replace(unfit=lambda case, reason=reason: reason)
        taken.append(with_backends(recipe, on_gpu, [64]).train.attention_backend)
    # Named, or on the CPU, or in a deterministic run, nothing is measured.
    attention_backends.measured = None
    named = replace(recipe, train=replace(recipe.train, attention_backend="flash"))
    same = replace(recipe, train=replace(recipe.train, deterministic=True))
    assert with_backends(named, on_gpu, [64]) is named
    assert with_backends(same, on_gpu, [64]) is same
    assert with_backends(recipe, mesh, [64]) is recipe
    return taken


def test_all_ranks_take_what_rank_0_has_measured_if_all_of_them_have_it(on_ranks, sandbox_recipe, tmp_path):
    chosen = "triton; forward causal: flash_4"
    assert on_ranks(2, decided, sandbox_recipe, tmp_path) == [["auto", chosen, chosen]] * 2


def test_the_table_is_whole_at_80_columns():
    timings = [
        Timing("forward", "causal", 0, "triton", 0.00123, ""),
        Timing("forward", "causal", 0, "flash_4", 0.0009, ""),
        Timing("continued", "documents", 0, "cudnn_flex", None, "lse is not -inf for the queries that see no key"),
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(backends_table(timings))
    text = console.export_text()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "flash_4 *" in text and "1.23" in text and "triton *" not in text
    assert backends.BACKENDS.keys() >= {"cudnn_flex"}
