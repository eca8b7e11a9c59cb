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
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = ("kernels", "parallel", "data", "model", "adapters", "launch")
MAY_IMPORT = {
    "kernels": set(),
    "parallel": {"kernels"},
    "data": {"kernels"},
    "model": {"kernels"},
    "adapters": {"kernels", "parallel"},
    "launch": {"kernels", "parallel", "data", "model"},
}
MODULES = sorted(path.relative_to(ROOT) for column in COLUMNS for path in (ROOT / column).rglob("*.py"))


Graph = dict[Path, set[Path]]


def imports(root: Path) -> Graph:
    """Return, for every module below the columns of `root`, the modules that it imports anywhere in it."""
    modules = {path.relative_to(root) for column in COLUMNS for path in (root / column).rglob("*.py")}
    graph: Graph = {}
    for module in modules:
        graph[module] = found = set()
        for node in ast.walk(ast.parse((root / module).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = Path(*module.parts[: -node.level], *(node.module or "").split("."))
                # `from .a import b` takes the module a/b.py, or the name b of a.py or a/__init__.py.
                for name in node.names:
                    candidates = (base / f"{name.name}.py", base / name.name / "__init__.py")
                    fallback = (base.with_name(f"{base.name}.py"), base / "__init__.py")
                    found |= {next(path for path in (*candidates, *fallback) if path in modules)}
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("longring"), (
                    f"{module}: imports within the house are relative"
                )
        found.discard(module)
    return graph


def rooms(graph: Graph, folder: Path) -> Graph:
    """Return the imports between the direct children of a folder, modules and sub-packages."""
    depth = len(folder.parts)
    collapsed: Graph = {}
    for module, found in graph.items():
        if module.parts[:depth] == folder.parts:
            room = Path(*module.parts[: depth + 1])
            inside = {Path(*other.parts[: depth + 1]) for other in found if other.parts[:depth] == folder.parts}
            collapsed.setdefault(room, set()).update(inside - {room})
    return collapsed


def floors(graph: Graph) -> list[set[Path]]:
    """Return the rooms floor by floor: each stands above all that it imports. Raises CycleError for a cycle or pair."""
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    found = []
    while sorter.is_active():
        ready = sorter.get_ready()
        found.append(set(ready))
        sorter.done(*ready)
    return found


IMPORTS = imports(ROOT)
FOLDERS = sorted({Path(), *(parent for module in MODULES for parent in module.parents)})


@pytest.mark.parametrize("column", COLUMNS)
def test_imports_go_one_way(column):
    allowed = MAY_IMPORT[column] | {column}
    for module, found in IMPORTS.items():
        if module.parts[0] == column:
            assert {other.parts[0] for other in found} <= allowed, f"{module} imports against the house"


def test_data_takes_compiled_loops_alone_from_the_foundation():
    found = {other for module, others in IMPORTS.items() if module.parts[0] == "data" for other in others}
    assert {other for other in found if other.parts[0] != "data"} == {Path("kernels/host_loop.py")}


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_no_two_rooms_import_each_other(folder):
    floors(rooms(IMPORTS, folder))


def test_the_data_column_has_few_floors():
    assert len(floors(rooms(IMPORTS, Path("data")))) <= 6


def drawing() -> str:
    """Draw the rooms of every column floor by floor, as docs/design.md shows them."""
    lines = []
    for column in reversed(COLUMNS):
        found = floors(rooms(IMPORTS, Path(column)))
        for number in range(len(found), 0, -1):
            names = sorted(
                path.stem if path.suffix else f"{path.name}/"
                for path in found[number - 1]
                if path.name not in ("__init__.py", "recipes")
            )
            lines.append(f"{column if number == len(found) else '':10}{number}  {', '.join(names)}".rstrip())
        lines.append("")
    return "\n".join(lines).strip()


def test_the_drawing_of_the_house_is_todays():
    assert drawing() in (ROOT / "docs" / "design.md").read_text(), f"docs/design.md should show:\n{drawing()}"


def test_a_new_pair_or_cycle_is_found(tmp_path):
    for column in COLUMNS:
        for package in ("a", "b"):
            (tmp_path / column / package).mkdir(parents=True)
            (tmp_path / column / package / "__init__.py").touch()
    (tmp_path / "data" / "a" / "one.py").write_text("from ..b import one\n")
    (tmp_path / "data" / "b" / "one.py").write_text("")
    floors(rooms(imports(tmp_path), Path("data")))
    (tmp_path / "data" / "b" / "two.py").write_text("def late():\n    from ..a.one import name\n")
    floors(rooms(imports(tmp_path), Path("data", "b")))
    with pytest.raises(CycleError):
        floors(rooms(imports(tmp_path), Path("data")))


def test_the_import_graph_is_seen():
    assert Path("parallel/cp/schedules.py") in IMPORTS[Path("parallel/cp/spec.py")]
    assert {path.parts[0] for path in IMPORTS[Path("launch/build.py")]} == {"launch", "kernels", "model", "parallel"}
    assert Path("launch/ranks/watchdog.py") in IMPORTS[Path("launch/train.py")]


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "longring.data.format.manifest, longring.data.read.loader",
            "pyarrow fsspec rich datasets faiss numba",
        ),
        # Its imports come before those of the ranks, and nothing else runs meanwhile.
        pytest.param(
            "longring.launch.commands.train", "megatron deepspeed torch._dynamo transformers", marks=pytest.mark.full
        ),
    ],
    ids=["training rank", "longring train"],
)
def test_a_process_loads_no_library_that_it_does_not_need(modules, absent):
    code = f"import sys, {modules}\nprint(sorted(set({absent.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_kernels_import_torch_triton_and_numba_only():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                root = name.split(".")[0]
                assert root in {"torch", "triton", "numba"} or root in sys.stdlib_module_names, f"{path} imports {name}"


@pytest.mark.full
def test_wheel_holds_every_module_and_recipe(tmp_path):
    """Built and imported from a directory of its own, where a column without a link in `longring` would be absent."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Its links to the columns become folders, as in an sdist.
    shutil.copytree(ROOT / "longring", source / "longring", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
        cwd=tmp_path,
    )
    [wheel] = tmp_path.glob("longring-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    expected = (
        {str(module) for module in MODULES}
        | {"__init__.py", "__main__.py", "py.typed"}
        | {"kernels/tuned.json", "parallel/cp/speeds.json"}
        | {"launch/report/page.html", "slurm/train.sbatch", "slurm/prepare.sbatch"}
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
    wanted = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    names = {re.split(r"[>=\[]", name)[0].lower() for name in wanted}
    assert names - {"longring"} <= pinned
