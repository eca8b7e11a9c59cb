"""The packages of Python's standard library: a truth about related documents that no method of ordering knows."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from longring.data.format.manifest import Manifest
from rich.console import Console

QUIET = Console(quiet=True)
FEW_PACKAGES = f"{sysconfig.get_paths()['stdlib']}/[h-j]*/*.py"
"""Glob of some packages, for the smallest size; a limit on documents would lose the file of each record."""


def package(title: str) -> str:
    """Return the package of a module of the standard library by its file; "." for a module outside packages."""
    root = sysconfig.get_paths()["stdlib"]
    return str(Path(title.partition(": ")[2]).parent.relative_to(root)) if root in title else "."


def packages_of(manifest: Manifest) -> list[str]:
    """Return the package of every record."""
    return [
        package(f": {file}") if entry["source"] == "documents" else "."
        for entry in manifest.inputs()
        for file in (entry["files"] if len(entry["files"]) == entry["records"] else [""] * entry["records"])
    ]
