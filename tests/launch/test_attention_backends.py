"""The backends of a run: measured by rank 0 in processes of their own, kept on disk, and the same on all ranks."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from longring.kernels import backends
from longring.kernels.backends import BACKENDS
from longring.kernels.case import Case
from longring.kernels.choose import Question, Timing, tiles_of
from longring.launch import attention_backends
from longring.launch.attention_backends import (
    FILE,
    backends_table,
    measured,
    measured_apart,
    question_of,
    recalled,
    with_backends,
)
from longring.launch.config import load_recipe
from longring.launch.measure_backend import LINE, question_from, question_json
from longring.parallel.mesh import Mesh, join
from rich.console import Console

CPU = torch.device("cpu")
CASE = Case("cpu", "interpreter", torch.float32, 16, 2, False)
TASKS = ("forward", "backward")


def test_the_tiles_of_a_run_have_its_batches_windows_and_shares(unread_recipe):
    question = question_of(load_recipe(unread_recipe), [64, 512, 1024])
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
    tiles = tiles_of(question_of(load_recipe(unread_recipe, [*pattern]), [512, 1024]), CPU)
    assert {("forward", "window"), ("continued", "documents"), ("forward", "documents")} <= set(tiles)
    assert question_from(question_json(question)) == question


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
        seconds = {"torch_cpu": 2.0, "triton": 0.5, "flash": 1.0}[name]
        found = [Timing(task, "causal", 0, name, seconds, "") for task in TASKS]
        return (found[:1], "its process ended with -11: nothing on stderr") if name == "triton" else (found, "")

    monkeypatch.setattr(attention_backends, "measured_apart", measure_apart)
    return asked


def test_what_was_measured_is_kept_for_this_machine_and_question(monkeypatch, caplog, asked, unread_recipe, tmp_path):
    question, file = question_of(load_recipe(unread_recipe), [512]), tmp_path / "triton" / FILE
    first = measured(question, CASE, CPU, file)
    times = (("torch_cpu", 2.0), ("triton", None), ("flash", 1.0))
    assert [(timing.task, timing.backend, timing.seconds) for timing in first] == [
        (task, *time) for time in times for task in TASKS
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(backends_table(first))
    table = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "triton its process ended with" in table and "flash *" in table and "triton *" not in table
    assert asked == ["torch_cpu", "triton", "flash"], "not reference, and none that does not fit"
    assert "attention backend flash_4: is not installed" in caplog.text
    assert "attention backend triton does not count: its process ended with -11" in caplog.text
    assert measured(question, CASE, CPU, file) == first and len(asked) == 3
    # Another question, then another version, then another device, which does not displace the first.
    measured(question_of(load_recipe(unread_recipe), [64]), CASE, CPU, file)
    assert len(asked) == 6
    for number, name in enumerate("AB", 3):
        machine = json.dumps({"device": name, "torch": "2.14"})
        monkeypatch.setattr(attention_backends, "machine_of", lambda device, machine=machine: machine)
        assert measured(question, CASE, CPU, file) == first
        assert len(asked) == 3 * number
    assert [json.loads(machine) for machine in json.loads(file.read_text())] == [
        {"device": "A", "torch": "2.14"}, {"device": "B", "torch": "2.14"}
    ]  # fmt: skip


MACHINE = json.dumps(json.dumps({"device": "CPU"}))  # as a key of the record


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[" * 10**5, '{"not json": {}}', '{"{}": {}}', f"{{{MACHINE}: []}}", f'{{{MACHINE}: {{"q": [[1]]}}}}'],
    ids=lambda text: text[:12],
)
def test_a_damaged_record_is_measured_again(asked, unread_recipe, tmp_path, caplog, text):
    question, file = question_of(load_recipe(unread_recipe), [512]), tmp_path / FILE
    file.write_text(text)
    assert len(measured(question, CASE, CPU, file)) == 6
    assert "cannot be read" in caplog.text
    assert measured(question, CASE, CPU, file) and len(asked) == 3


DIED = "its process ended with 1: out of memory"


@pytest.mark.parametrize(
    ("measured_of", "notes"),
    [
        ({"torch_cpu": ([], DIED)}, {"torch_cpu": DIED}),
        ({"flash": ([], "no end within 3 s")}, {}),
        ({"flash": ([Timing("forward", "causal", 0, "flash", None, "out differs")], "")}, {"flash": "out differs"}),
    ],
    ids=["the default died", "time ran out", "none is right"],
)
def test_a_measurement_without_a_whole_answer_is_not_kept(
    monkeypatch, asked, unread_recipe, tmp_path, measured_of, notes
):
    monkeypatch.setattr(attention_backends, "measured_apart", lambda _, name, *__: measured_of.get(name, ([], "")))
    found = measured(question_of(load_recipe(unread_recipe), [512]), CASE, CPU, tmp_path / FILE)
    assert {timing.backend: timing.note for timing in found} == notes
    assert not (tmp_path / FILE).exists()


@pytest.mark.full
def test_a_process_that_ends_before_it_has_measured_is_told(unread_recipe):
    """Processes that measure are those of test_attention_backends_start.py."""
    question = question_of(load_recipe(unread_recipe), [64])
    assert measured_apart(question, "absent", CPU, 120) == ([], "its process ended with 1: KeyError: 'absent'")
    assert measured_apart(question, "torch_cpu", CPU, 0.01) == ([], "no end within 0 s")


@pytest.mark.parametrize(
    ("printed", "note"),
    [
        (["compiling", "{}timing 3 s", "{}"], ""),
        (["compiling", "{}"], "its process ended after 1 of 2 timings: Fatal \N{REPLACEMENT CHARACTER}"),
        ([f"{LINE}of a package", "{}", "{}"], "its process printed what cannot be read: Expecting value"),
        ([f"{LINE}[1]", "{}", "{}"], "its process printed what cannot be read: Timing.__new__() missing"),
    ],
)
def test_what_a_package_prints_or_ends_early_is_no_timing(monkeypatch, tmp_path, unread_recipe, printed, note):
    """A program stands for Python: it prints what a package might, bytes that are no text too, and ends with 0."""
    question = question_of(load_recipe(unread_recipe), [64])
    timing = Timing("forward", "causal", 0, "torch_cpu", 0.5, "")
    text = "".join(part.format(f"\n{LINE}{json.dumps(timing)}\n") for part in printed)
    (tmp_path / "printed").write_bytes(b"\xff\n" + text.encode())
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/printed\nprintf 'Fatal \\377' >&2\n")
    program.chmod(0o755)
    monkeypatch.setattr(attention_backends.sys, "executable", str(program))
    found, said = measured_apart(question, "torch_cpu", CPU, 120)
    assert (said == note == "" and found == [timing, timing]) or (note and said.startswith(note))


MACHINE = {"device": "A", "torch": "2.13", "packages": {"flash-attn-4": "4.0"}}
KEPT = "torch_cpu; forward causal: flash"


class Kept(NamedTuple):
    """The record of a run, and the tasks and backends that are checked before it is taken."""

    question: Question
    file: Path
    checked: list[str]

    def __call__(self, **changes: object) -> tuple[str | None, str]:
        """Return what a start recalls of the record with these changes."""
        record = {"machine": MACHINE, "tiles": repr(self.question), "backend": KEPT, **changes}
        self.file.write_text(json.dumps(record))
        return recalled(self.file, self.question, CASE, CPU, time.monotonic() + 9)


@pytest.fixture
def kept(monkeypatch, asked, unread_recipe, tmp_path) -> Kept:
    """A record of this machine, all of whose backends pass their check."""
    found = Kept(question_of(load_recipe(unread_recipe), [512, 64]), tmp_path / FILE, [])
    monkeypatch.setattr(attention_backends, "machine_of", lambda device: json.dumps(MACHINE))

    def check(of_backend, name, device, seconds):
        assert 0 < seconds <= 9
        assert {sample.batch for sample in of_backend.samples} == {8}, "of one kind the tile with most sequences"
        found.checked.extend(f"{sample.tasks[0]} {name}" for sample in of_backend.samples)
        return [Timing(sample.tasks[0], "causal", 0, name, 1.0, "") for sample in of_backend.samples], ""

    monkeypatch.setattr(attention_backends, "measured_apart", check)
    return found


def test_backends_of_a_record_are_taken_after_a_check_of_each(kept):
    assert recalled(kept.file, kept.question, CASE, CPU, 0.0) == (None, ""), "no record"
    assert kept() == (KEPT, "")
    assert kept.checked == ["forward flash", "backward torch_cpu"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"machine": {**MACHINE, "device": "B"}}, "device from 'B' to 'A'"),
        ({"machine": {**MACHINE, "packages": {}}}, "packages.flash-attn-4 from None to '4.0'"),
        ({"tiles": "others"}, "other tiles than in "),
        ({"backend": "triton; forward causal: flash_4"}, f"flash_4 of .*{FILE}: is not installed"),
        ({"backend": "triton; forward causal"}, f"{FILE} is damaged"),
        ({"backend": "triton; forward causal: flash_9"}, f"{FILE} is damaged .*flash_9"),
        ({"backend": "flash_9; forward causal: flash"}, f"{FILE} is damaged .*flash_9"),
        ({"backend": ["flash"]}, f"{FILE} is damaged"),
        ({"machine": "A"}, f"{FILE} is damaged"),
    ],
)  # fmt: skip
def test_a_record_of_another_machine_or_kernel_is_told_and_not_taken(kept, changes, said):
    backend, changed = kept(**changes)
    assert backend is None and re.search(said, changed)
    assert not any("flash_4" in checked for checked in kept.checked)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_record_without_a_choice_is_told_and_not_taken(kept, content):
    kept.file.write_bytes(content)
    backend, changed = recalled(kept.file, kept.question, CASE, CPU, 0.0)
    assert backend is None and f"{FILE} is damaged" in changed


@pytest.mark.parametrize(
    ("found", "note", "said"),
    [
        ([], "its process ended with -11: nothing on stderr", "its process ended with -11"),
        ([Timing("forward", "causal", 0, "flash", None, "out differs")], "", "out differs"),
        ([], "", "does not compute all of its tiles"),
    ],
)
def test_a_kernel_that_no_longer_passes_is_told_and_not_taken(monkeypatch, kept, found, note, said):
    monkeypatch.setattr(attention_backends, "measured_apart", lambda *_: (found, note))
    backend, changed = kept()
    assert backend is None and changed.startswith(f"flash of {kept.file}: {said}")


def decided(recipe_file: Path, folder: Path) -> list[str]:
    """Return what this rank takes in starts of a run, and what rank 0 prints.

    Rank 1 lacks what rank 0 has chosen; it has it; another run; its resume, with other times; one on another machine.
    At last no backend is right for a tile, or none that all ranks have.
    """
    recipe, taken = load_recipe(recipe_file), list[str]()
    mesh: Mesh = join(recipe.parallel, 1)
    on_gpu = replace(mesh, device=torch.device("cuda"))
    attention_backends.architecture = lambda device: "sm_90"
    attention_backends.rehearse = lambda question, backend, device: None
    attention_backends.tiles_of = lambda question, device: tiles_of(question, CPU)
    os.environ["TRITON_CACHE_DIR"] = str(folder)

    def start(machine: str, seconds: float, lacking: int | None = None, file: Path | None = None) -> None:
        """Take backends on a machine, where `triton` takes 2 s and `flash_4` some forward."""
        console = Console(width=80, file=io.StringIO()) if mesh.rank == 0 else None
        reason = "is not installed" if mesh.rank == lacking else None
        BACKENDS["flash_4"] = BACKENDS["flash_4"]._replace(unfit=lambda case: reason)
        attention_backends.machine_of = lambda device: json.dumps({"device": machine})
        attention_backends.measured_apart = lambda question, name, device, seconds: (
            [Timing(sample.tasks[0], "causal", 0, name, 1.0, "") for sample in question.samples], ""
        )  # fmt: skip
        attention_backends.measured = lambda *_: [
            Timing("forward", "causal", 0, "triton", 2.0, ""),
            Timing("forward", "causal", 0, "flash_4", seconds, ""),
            Timing("backward", "causal", 0, "triton", 1.0, ""),
            Timing("backward", "causal", 0, "flash_4", None, "dq differs"),
        ]
        taken.append(with_backends(recipe, on_gpu, [64], console, file).train.attention_backend)
        if console is not None:
            said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
            printed.extend(line for line in said if line.startswith("attention backends:"))

    printed = list[str]()
    start("A", 1.0, lacking=1)
    start("A", 1.0)
    file = folder / "run" / FILE
    for machine, seconds, lacking in (("A", 1.0, None), ("A", 3.0, None), ("B", 3.0, None)):
        start(machine, seconds, lacking, file)
    # Rank 1 loses what the run has taken, and then has it again.
    start("B", 3.0, None, file)
    if mesh.rank == 0:
        file.write_text(file.read_text().replace('"triton"', '"triton; forward causal: flash_4"'))
    for lacking in (1, None):
        start("B", 1.0, lacking, file)
    for right in ((), ("flash_4",)):
        attention_backends.measured = lambda *_, right=right: [
            Timing("forward", "causal", 0, "triton", None, "out differs"),
            *(Timing("forward", "causal", 0, name, 1.0, "") for name in right),
        ]
        BACKENDS["flash_4"] = BACKENDS["flash_4"]._replace(unfit=lambda case: "is not installed" if mesh.rank else None)
        with pytest.raises(ValueError, match="no backend passed") as error:
            with_backends(recipe, on_gpu, [64])
        taken.append(str(error.value))
    # Named, or on the CPU, or in a deterministic run, nothing is measured or recalled.
    attention_backends.measured = attention_backends.recalled = None
    named = replace(recipe, train=replace(recipe.train, attention_backend="flash"))
    same = replace(recipe, train=replace(recipe.train, deterministic=True))
    assert with_backends(named, on_gpu, [64], None, file) is named
    assert with_backends(same, on_gpu, [64], None, file) is same
    assert with_backends(recipe, mesh, [64], None, file) is recipe
    return [*taken, *printed]


def test_all_ranks_take_what_rank_0_has_measured_or_the_run_has_kept(on_ranks, unread_recipe, tmp_path):
    flash, file = "triton; forward causal: flash_4", tmp_path / "run" / FILE
    [first, *taken], other = on_ranks(2, decided, unread_recipe, tmp_path)
    assert [first, *taken[: len(other) - 1]] == other
    none_right = (
        "attention backend = 'auto': no backend passed its check in the forward of causal tiles (triton: out differs); "
        'name one (in a recipe train.attention_backend), which no start checks: "reference" computes every tile, but '
        "holds all scores"
    )
    assert other == ["triton", flash, flash, flash, *["triton"] * 4, none_right, none_right]
    lacks = f"attention backends: {flash}: not those of all ranks (rank 1: flash_4: is not installed); all take triton"
    assert taken[len(other) - 1 :] == [
        f"{lacks} from here",
        f"attention backends: {flash} (as before: {file})",
        "attention backends: device from 'A' to 'B': measured anew; sums may round differently from here",
        f"attention backends: triton (as before: {file})",
        f"attention backends: {flash} (as before: {file})",
        f"{lacks} from here",
        f"attention backends: triton (as before: {file})",
    ]


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
