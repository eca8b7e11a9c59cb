"""The files below a directory, for comparisons of whole directories."""

from __future__ import annotations

from pathlib import Path


def tree(directory: str | Path) -> dict[str, bytes]:
    """Return the content of every file below a directory, by its path in it."""
    root = Path(directory)
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
