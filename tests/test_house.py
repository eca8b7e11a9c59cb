"""The house: imports go one way, and the wheel holds all of it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = ("kernels", "parallel", "data", "model", "launch")
MAY_IMPORT = {
    "kernels": set(),
    "parallel": {"kernels"},
    "data": set(),
    "model": {"kernels"},
    "launch": {"kernels", "parallel", "data", "model"},
}
MODULES = sorted(path.relative_to(ROOT) for column in COLUMNS for path in (ROOT / column).rglob("*.py"))


def imported_columns(module: Path) -> set[str]:
    """Columns of ours that a module imports, anywhere in it: relative imports resolved by their dots."""
    package = module.parent.parts
    found = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = (*base, *(node.module or "").split("."))
            found.add(target[0] if node.level else target[1] if target[0] == "longring" else "")
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("longring.")}
    return (found & set(COLUMNS)) - {package[0]}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way(module):
    assert imported_columns(module) <= MAY_IMPORT[module.parts[0]]


def test_the_layer_check_sees_imports():
    assert imported_columns(Path("launch/build.py")) == {"kernels", "model", "parallel"}
    assert imported_columns(Path("parallel/cp/execute.py")) == {"kernels"}


def test_nothing_that_is_read_can_run_code():
    """No pickle, no unpacking of archives, no evaluation of text, no shell."""
    runs_code = re.compile(
        r"\bpickle\b|torch\.load\(|allow_pickle=True|\.extract(all)?\(|(?<![.\w])(eval|exec)\(|shell=True|yaml\.load"
    )
    for module in MODULES:
        for line in (ROOT / module).read_text().splitlines():
            assert not runs_code.search(line), f"{module}: {line}"


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                root = name.split(".")[0]
                assert root in {"torch", "triton"} or root in sys.stdlib_module_names, f"{path} imports {name}"


def test_wheel_holds_every_module_and_recipe(tmp_path):
    """Built and imported from a directory of its own: a package missing from pyproject.toml would be absent here."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for column in (*COLUMNS, "slurm"):
        shutil.copytree(ROOT / column, source / column, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
        cwd=tmp_path,
    )
    [wheel] = tmp_path.glob("longring-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    expected = (
        {str(module) for module in MODULES}
        | {"kernels/tuned.json", "slurm/train.sbatch", "slurm/prepare.sbatch"}
        | {str(path.relative_to(ROOT)) for path in (ROOT / "launch" / "recipes").glob("*.toml")}
    )
    site = tmp_path / "site" / "longring"
    assert {str(path.relative_to(site)) for path in site.rglob("*.*")} == expected
    names = [".".join(("longring", *module.with_suffix("").parts)).removesuffix(".__init__") for module in MODULES]
    names.remove("longring.launch.demo")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        f"import importlib\nfor name in {names!r}:\n"
        f"    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__\n"
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path, env=environment)


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {name.partition("==")[0].partition("[")[0].lower() for name in wanted}
    assert names <= pinned
    assert "torch==2.13.0" in project["dependencies"]
