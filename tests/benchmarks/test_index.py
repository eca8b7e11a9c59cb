"""benchmarks/README.md lists every benchmark with records and documents that exist; each script's help is whole."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from lib.script import help_text

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "benchmarks" / "README.md"
SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))
RECORDS = sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("*.json"))


def rows() -> dict[str, list[str]]:
    """Return the cells of each benchmark's row, by script."""
    lines = [line for line in INDEX.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_index_has_every_script_and_no_other():
    assert list(rows()) == SCRIPTS


def test_the_index_has_every_record():
    told = {record for row in rows().values() for record in re.findall(r"results/([^`]+\.json)", row[2])}
    assert sorted(told) == RECORDS


def test_every_path_of_the_index_exists():
    text = INDEX.read_text()
    paths = re.findall(r"\b(?:benchmarks|docs|kernels|tests)/[\w./-]*\w", text)
    assert len(paths) > 50
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_row_is_about_its_script(script):
    question, command, _, used_by, takes = rows()[script]
    assert question.endswith("?") and takes
    assert shlex.split(command.strip("`"))[:2] == ["python", f"benchmarks/{script}"]
    for document in re.findall(r"[\w./-]+\.md", used_by):
        assert f"benchmarks/{script}" in (ROOT / document).read_text(), f"{document} does not name {script}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_an_example_and_fits_80_columns(script):
    doc = ast.get_docstring(ast.parse((ROOT / "benchmarks" / script).read_text()), clean=False)
    assert doc and f"    python benchmarks/{script} " in doc
    assert doc.split("\n\n")[0].endswith("."), "a docstring is a statement; README.md has the question"
    assert [line for line in help_text(doc).splitlines() if len(line) > 80] == []
