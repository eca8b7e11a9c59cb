"""The site: every setting, command, public name and record has its text, and no page loads anything from a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import longring
import pytest
from longring.launch.cli import COMMANDS
from longring.launch.config import load_recipe
from longring.launch.settings import flat, to_tree

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^>]*>|@import|url\(\"?https?:")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Return the site, built as `make site` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    return folder


def test_a_warning_ends_make_site():
    """With --quiet mkdocs counts no warnings, and a dead link would pass."""
    [command] = re.findall(r"-m mkdocs build(.*)", (ROOT / "Makefile").read_text())
    assert command.split() == ["--strict"]


def test_every_setting_has_a_type_a_default_and_a_meaning(site):
    page = (site / "docs" / "settings.html").read_text()
    keys = list(flat(to_tree(load_recipe(ROOT / "launch" / "recipes" / "demo.toml"))))
    assert len(keys) > 100
    for key in keys:
        found = re.search(rf'<h4 id="{re.escape(key)}">.*?<p class="setting">(.*?)</p>\s*<p>\w', page, re.DOTALL)
        assert found and "<h4" not in found[0][4:], key
        assert " · default <code>" in found[1] or found[1].endswith(" · required"), key
    assert "integer from 1 to 99,999,999 · required" in page  # train.steps


def test_a_message_with_braces_stays_whole(site):
    """The extension attr_list would take them for attributes of the cell."""
    assert "must be a table, such as {key = 1}" in (site / "docs" / "errors.html").read_text()


def test_a_path_in_a_table_breaks_after_its_slashes(site):
    """It would take the width of a phone, and leave none for the other columns."""
    assert "<code>Megatron-LM/<wbr>README.md</code>" in (site / "docs" / "comparison.html").read_text()


def test_every_command_has_its_help(site):
    page = (site / "docs" / "commands.html").read_text()
    assert [command.name for command in COMMANDS if f"usage: longring {command.name} " not in page] == []


def test_every_public_name_has_its_docstring(site):
    page = (site / "docs" / "api.html").read_text()
    assert {name for name in longring.__all__ if f'id="longring.{name}"' not in page} == {"__version__"}
    assert "Collective." in page


def test_every_record_has_a_page_to_which_the_index_leads(site):
    index = (site / "benchmarks" / "index.html").read_text()
    for record in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f'href="results/{record.name}.html"' in index
        assert "<table>" in (site / "benchmarks" / "results" / f"{record.name}.html").read_text()


def test_no_page_loads_anything_from_a_network(site):
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 80
    assert {str(path): OUTSIDE.findall(path.read_text()) for path in pages if OUTSIDE.search(path.read_text())} == {}
