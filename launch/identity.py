"""The identity of a run: what all of its ranks have in common, and what every start and checkpoint records."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..data.files import sha256_of, sha256_of_json
from ..data.read.batch_order import ORDER
from .config import Recipe
from .settings import flat, to_tree

COLUMNS = ("data", "kernels", "launch", "model", "parallel")
PACKAGES = (
    *("longring", "torch", "numpy", "deepspeed", "megatron-core", "triton", "liger-kernel", "safetensors"),
    "tokenizers",
)
"""Packages whose version decides what a step computes or how a file is read."""
OWN_TO_A_MACHINE = ("data.directory", "order.directory", "order.work_directory", "loader.cache_", "loader.workers")
"""Beginnings of the keys in which ranks may differ: prepared data may lie elsewhere on each machine, as it is known by
its hash, and so may its cache."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The recipe, data, code and packages of a run, and the id of the run itself."""

    run: str
    """Random id of the run, made at its first start."""
    recipe: dict[str, Any]
    """Resolved recipe as nested tables, as in recipe.json."""
    data: str
    """SHA-256 of the manifest of the prepared data."""
    code: str
    """SHA-256 of the code of LongRing."""
    packages: dict[str, str]
    """Versions of Python and of PACKAGES, by name."""
    order: int = ORDER
    """Version of the order of batches."""

    @property
    def common(self) -> dict[str, Any]:
        """Everything in which all ranks must agree, by the name under which an error reports it."""
        recipe = {key: value for key, value in flat(self.recipe).items() if not key.startswith(OWN_TO_A_MACHINE)}
        return {**recipe, "SHA-256 of the data's manifest": self.data[:16], **self.software}

    @property
    def software(self) -> dict[str, str]:
        """Versions of the packages and the beginning of the code's SHA-256, by name."""
        return {**self.packages, "SHA-256 of LongRing's code": self.code[:16]}

    @property
    def digest(self) -> str:
        """SHA-256 of `common`: equal for two starts that train the same."""
        return sha256_of_json(self.common)


def identity_of(recipe: Recipe, data: str, run: str) -> Identity:
    """Return the identity of a run with this recipe, data hash and run id, under the code and packages of today."""
    return Identity(run=run, recipe=to_tree(recipe), data=data, code=code_hash(), packages=package_versions())


def code_hash() -> str:
    """Return the SHA-256 of LongRing's modules and of the tuned block sizes, wherever they are installed."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    files = [file for column in COLUMNS for kind in ("py", "json") for file in (root / column).rglob(f"*.{kind}")]
    for file in sorted(files):  # rglob's order is the file system's
        digest.update(f"{file.relative_to(root).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of PACKAGES; a package that is not installed has the version "none"."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (value before, value now) of every key that differs, by key; None stands for a key that is absent."""
    keys = sorted(before.keys() | now.keys())
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}
