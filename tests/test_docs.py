"""The documents name files and functions that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "kernels",
    "parallel",
    "data",
    "model",
    "adapters",
    "launch",
    "slurm",
    "tests",
    "benchmarks",
    "examples",
    "docs",
)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [path for folder in FOLDERS[:6] for path in (ROOT / folder).rglob("*.py")]
DATA_PATH = ROOT / "docs" / "data-path.md"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)[^)]*\)")
FILE = re.compile(rf"(?<![\w./<-])((?:{'|'.join(FOLDERS)})/(?![\w./-]*NAME)[\w./-]*\.(?:py|md|toml|json|png|sbatch))\b")
DEFINED = re.compile(r"`([\w/]+\.py)`\s+\(((?:`\w+`(?:,\s+)?)+)\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_files_that_exist(document: Path):
    text = document.read_text()
    links = [document.parent / target for target in LINK.findall(text)]
    missing = [path for path in [*links, *(ROOT / name for name in FILE.findall(text))] if not path.exists()]
    assert not missing


def defines(text: str, name: str) -> bool:
    return re.search(rf"^\s*(?:def|class) {name}\b", text, re.MULTILINE) is not None


def test_the_data_path_names_functions_that_exist():
    named = DEFINED.findall(DATA_PATH.read_text())
    assert len(named) >= 20
    for file, names in named:
        for name in re.findall(r"\w+", names):
            assert defines((ROOT / file).read_text(), name), f"{file} has no {name}"


def test_the_drawing_names_functions_that_exist():
    """A step of the drawing is `module.function` or `Class.method`, and the drawing fits a terminal."""
    drawing = DATA_PATH.read_text().split("```")[1]
    assert max(map(len, drawing.splitlines())) <= 80
    steps = re.findall(r"^   \|  +(\w+)\.(\w+)\b", drawing, re.MULTILINE)
    assert len(steps) >= 15
    for owner, name in steps:
        texts = [path.read_text() for path in SOURCES if path.stem == owner or defines(path.read_text(), owner)]
        assert any(defines(text, name) for text in texts), f"nothing defines {owner}.{name}"


TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_the_security_page_names_tests_that_exist():
    """Every row of a table of hostile things ends with the tests that try it."""
    text = (ROOT / "docs" / "security.md").read_text()
    named = TEST.findall(text)
    assert len(named) >= 15
    for file, name in named:
        assert defines((ROOT / file).read_text(), name), f"{file} has no {name}"
    tables = re.findall(r"^\| .* \| what comes of it \| test \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(tables) >= 5
    for row in "".join(tables).splitlines():
        assert TEST.search(row.rsplit(" | ", 1)[1]), f"no test tries it: {row}"


PROJECTS = ("Megatron-LM", "torchtitan", "OLMo-core", "DeepSpeed", "MagiAttention", "ring-flash-attention")


def test_every_row_of_the_comparison_names_its_source():
    """A row on a project ends with files of its repository, read at the commit of the first table; ours with pages."""
    text = (ROOT / "docs" / "comparison.md").read_text()
    assert len(re.findall(r"/tree/[0-9a-f]{40}\)", text)) == len(PROJECTS) + 1, "and TransformerEngine"
    tables = re.findall(r"^\| project \|.* source \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(tables) >= 8
    for row in "".join(tables).splitlines():
        name, *_, source = row.strip("| ").split(" | ")
        if name == "LongRing":
            assert LINK.search(source), row
            continue
        named = re.findall(r"`([^`/]+)/[^`]+`", source)
        assert named and set(named) <= {*name.split(", "), "TransformerEngine"}, row
    for table in tables:
        missing = [name for name in (*PROJECTS[:4], "LongRing") if name not in table]
        assert not missing, f"{missing} in:\n{table}"
