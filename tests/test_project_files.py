"""The files by which others find, cite and report to the project, and the image, name what exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PAGES = [ROOT / name for name in ("SECURITY.md", "CODE_OF_CONDUCT.md", ".github/pull_request_template.md")]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_is_one_that_the_forge_shows(form: Path):
    """GitHub leaves out a form without a name, a description or a body, and one with two fields of one id."""
    content = yaml.safe_load(form.read_text())
    assert set(content) == {"name", "description", "labels", "body"}
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert fields and all(field["type"] in ("textarea", "input", "dropdown", "checkboxes") for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_the_oldest_set_has_the_lower_bounds_of_the_library_and_of_preparation():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    for bound in [*project["dependencies"], *project["optional-dependencies"]["prepare"]]:
        name, least = bound.removesuffix("a0").split(">=")  # a vendor's build of 2.9.0 calls itself 2.9.0a0
        assert f"{pinned[name]}.".startswith(f"{least}."), f"{bound}: the oldest set has {pinned.get(name)}"


def test_the_classifiers_are_the_versions_of_python_that_are_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [name.split(" :: ")[-1] for name in project["classifiers"] if name.startswith("Programming Language")]
    assert project["requires-python"] == f">={versions[0]},<3.{int(versions[-1].partition('.')[2]) + 1}"
    assert project["keywords"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["keywords"]


def test_the_citation_names_no_person_and_no_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= set(citation), "without these the file is invalid"
    assert citation["authors"] == [{"name": "The LongRing authors"}]
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    assert "version" not in citation, "pyproject.toml has it"


@pytest.mark.parametrize("page", [*PAGES, *FORMS], ids=lambda path: path.name)
def test_a_page_names_files_that_exist(page: Path):
    text = page.read_text()
    named = re.findall(r"\b(?:docs|slurm|launch|benchmarks)/[\w/.-]*\w|\b[A-Z]+\.md\b", text)
    assert not [name for name in named if not (ROOT / name).exists()]
    assert not re.search(r"[\w.]+@[\w-]+\.\w", text), "no address of a person"
