"""The tables of documents are those that `python benchmarks/tables` makes of the stored records."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tables import TABLES, speeds
from tables.table import Table

ROOT = Path(__file__).parents[2]
RECORD = "install_2_cores_2026-11-22"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.document} {table.header}")
def test_a_table_is_made_of_its_records(table):
    text = (ROOT / "docs" / table.document).read_text()
    assert table.written(text) == text, "run python benchmarks/tables"


@pytest.mark.parametrize("document", dict.fromkeys(table.document for table in TABLES))
def test_rows_that_are_not_of_a_record_do_not_stay(document):
    text = (ROOT / "docs" / document).read_text()
    of_records = [table for table in TABLES if table.document == document]
    for table in of_records:
        head, header, rest = text.partition(table.header)
        titles, rule, *rows = (header + rest).splitlines(keepends=True)
        assert rows[0].lstrip().startswith("|")
        changed = "".join((head, titles, rule, rows[0].replace(rows[0].split("|")[-2], " 1 "), *rows[1:]))
        assert changed != text and table.written(changed) == text


def sizes(record):
    yield from (("none", f"{row['distributions']}") for row in record["sizes"][:1])


def test_a_document_names_its_record_and_has_the_table_once():
    table = Table("a.md", "| extra |", sizes, (RECORD,))
    text = f"`benchmarks/results/{RECORD}.json`\n\n  | extra | distributions |\n  |---|---|\n  | gone | 1 |\nEnd."
    assert table.written(text).splitlines()[2:] == [
        "  | extra | distributions |",
        "  |---|---|",
        "  | none | 33 |",
        "End.",
    ]
    with pytest.raises(ValueError, match="does not name"):
        table.written(text.replace("json", "toml"))
    with pytest.raises(ValueError, match="0 lines begin with"):
        table.written(text.replace("| extra", "| extras"))
    with pytest.raises(ValueError, match="2 lines begin with"):
        table.written(text + "\n| extra |")
    with pytest.raises(ValueError, match="other columns than its rows"):
        table.written(text.replace("| distributions |", "|"))


def test_the_command_writes_the_documents_that_have_other_rows(tmp_path):
    for folder in ("docs", "benchmarks/tables", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    changed, before = tmp_path / "docs" / "api.md", (ROOT / "docs" / "api.md").read_text()
    changed.write_text(before.replace("| 33 | 986 |", "| 33 | 985 |"))
    (tmp_path / "parallel" / "cp").mkdir(parents=True)
    (tmp_path / "parallel" / "cp" / "speeds.json").write_text('{"a device": {}}')
    for printed in ("docs/api.md: changed\nparallel/cp/speeds.json: changed\n", ""):
        command = [sys.executable, tmp_path / "benchmarks" / "tables"]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")
    assert changed.read_text() == before
    assert (tmp_path / "parallel" / "cp" / "speeds.json").read_text() == speeds.FILE.read_text()


def backend_row(backend, task, tokens, ms, tflops, mask="causal"):
    return {"backend": backend, "task": task, "mask": mask, "tokens": tokens, "ms": ms, "tflops": tflops}


def test_the_speeds_of_the_cost_model_are_those_of_the_records(tmp_path):
    assert speeds.speeds_text() == speeds.FILE.read_text(), "run python benchmarks/tables"
    rows = [
        backend_row("triton", "forward", 2048, 0.11, 200.0),  # 0.022 TFLOP: 0.055 ms at 400 TFLOP/s
        backend_row("triton", "forward", 32768, 10.0, 400.0),
        backend_row("triton", "backward", 32768, 30.0, 250.0),
        backend_row("triton", "backward", 131072, 1.0, 999.0, mask="whole"),
        backend_row("cudnn", "forward", 32768, 8.0, 500.0),
        backend_row("cudnn", "backward", 32768, 40.0, 200.0),
        backend_row("flash_4", "forward", 32768, None, None),
        backend_row("flash", "forward", 32768, 1.0, 9999.0),  # no backward
        {"backend": "flash_3", "note": "flash_3: is not installed"},
    ]
    triton, cudnn = ({"forward_flops": a, "backward_flops": b, "tile_s": s}
                     for a, b, s in ((4e14, 2.5e14, 5.5e-5), (5e14, 2e14, 0.0)))  # fmt: skip
    fastest = {"forward_flops": 5e14, "backward_flops": 2.5e14, "tile_s": 0.0}
    assert speeds.speeds(rows) == {"triton": triton, "cudnn": cudnn, "auto": fastest}
    for name, device in (("gpu_a_1", "NVIDIA A"), ("gpu_a_2", "NVIDIA A"), ("gpu_cpu", "CPU x86_64")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"device": device, "backends": rows}))
    (tmp_path / "other.json").write_text(json.dumps({"device": "NVIDIA B", "rows": []}))
    found = json.loads(speeds.speeds_text(tmp_path))
    assert found.keys() == {"NVIDIA A"}
    assert found["NVIDIA A"]["cudnn"] == {"speed": cudnn, "record": "benchmarks/results/gpu_a_2.json"}
