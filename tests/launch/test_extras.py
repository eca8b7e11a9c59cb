"""The extras: every library that is imported is listed where it is used, and a missing one is one line."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import longring
import pytest
from longring.launch.cli import main
from longring.launch.errors import USER_ERROR
from longring.launch.extras import MODULES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STAGES = {name: listed for name, listed in PROJECT["optional-dependencies"].items() if name in MODULES}
NOT_IMPORTED = {"aiohttp", "tensorboard", "zstandard"}
"""Modules that others import for us: fsspec for http and .zst, torch for TensorBoard."""
RECIPE = str(ROOT / "launch" / "recipes" / "demo.toml")


def names(requirements: list[str]) -> set[str]:
    """Return the normalized names of distributions, without extras of our own."""
    found = {re.split(r"[>=\[]", requirement)[0].lower().replace("_", "-") for requirement in requirements}
    return found - {"longring"}


def imported() -> set[str]:
    """Return the top-level modules of others that the code imports anywhere."""
    found = set()
    for column in ("kernels", "parallel", "data", "model", "launch"):
        for path in (ROOT / column).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                found |= {module.partition(".")[0] for module in modules}
    return found - set(sys.stdlib_module_names)


def test_what_is_listed_is_used_and_what_is_used_is_listed():
    of_modules = packages_distributions()

    def distributions(modules: set[str]) -> set[str]:
        return {name.lower().replace("_", "-") for module in modules for name in of_modules[module][:1]}

    for extra, modules in MODULES.items():
        assert names(STAGES[extra]) == distributions({*modules}), extra
    staged = {module for modules in MODULES.values() for module in modules}
    assert staged - imported() == NOT_IMPORTED
    # shtab is imported by the command alone, the rest by the library.
    assert distributions(imported() - staged) == names(PROJECT["dependencies"])


def test_the_library_pins_nothing_and_all_has_every_stage():
    assert all(">=" in requirement and "==" not in requirement for requirement in PROJECT["dependencies"])
    assert PROJECT["optional-dependencies"]["all"] == [f"longring[{','.join(STAGES)}]"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("pyarrow", ["prepare", RECIPE], "prepare"),
        ("faiss", ["order", RECIPE, "data.rest=pack", "order.mode=in_context", "order.directory=nowhere"], "order"),
        ("psutil", ["evaluate", RECIPE], "train"),
        ("jinja2", ["report", RECIPE], "report"),
    ],
)
def test_a_missing_library_is_one_line(module: str, arguments: list[str], extra: str, tmp_path: Path):
    start = f"from longring.launch.cli import main\nsys.exit(main({arguments!r}))"
    code = f"import sys; sys.modules[{module!r}] = None\n{start}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    wanted = f"error: {module}: is not installed; run pip install 'longring[{extra}]'\n"
    assert (done.returncode, done.stderr) == (USER_ERROR, wanted)


def test_a_missing_library_of_a_public_name_is_one_line(monkeypatch: pytest.MonkeyPatch):
    """Today's public names need no extra: one is read from a module that does."""
    monkeypatch.delitem(sys.modules, "longring.data.order.neighbors", raising=False)
    monkeypatch.delitem(vars(longring), "document_order", raising=False)
    monkeypatch.setitem(longring._MODULE_OF, "document_order", "data.order.neighbors")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"longring\.document_order: faiss: is not installed; run pip install 'long"):
        longring.document_order  # noqa: B018


def test_a_module_of_no_extra_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delitem(sys.modules, "longring.launch.commands.inspect", raising=False)
    monkeypatch.setitem(sys.modules, "longring.launch.commands.inspect", None)
    with pytest.raises(ModuleNotFoundError, match="commands.inspect"):
        main(["inspect", str(tmp_path)])
