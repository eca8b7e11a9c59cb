"""Kernels of packages that may be installed: whether they are, and whether their functions are those known here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@cache
def installed(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None. Nothing is imported."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version; a pre-release counts as its release."""
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


@cache
def unfit_package(distribution: str, module: str, functions: tuple[tuple[str, tuple[str, ...]], ...]) -> str | None:
    """Return why the functions of a module cannot be called as here, or None; `functions` are names with parameters.

    The module is imported only if the distribution is installed. Its functions may be private, so that another version
    may have changed them: they are refused before a call, not in it.
    """
    found = installed(distribution)
    if found is None:
        return f"{distribution} is not installed"
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a package may fail in any way without a driver or a library
        return f"{distribution} {found}: {module} cannot be imported: {type(error).__name__}: {error!s:.200}"
    for name, parameters in functions:
        function = getattr(imported, name, None)
        if function is None:
            return f"{distribution} {found}: {module} has no {name}"
        if missing := [parameter for parameter in parameters if parameter not in _parameters(function)]:
            return f"{distribution} {found}: {name} has no parameter {', '.join(missing)}"
    return None


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Return the names of a function's parameters; those of the function inside if torch made an operator of it."""
    return set(inspect.signature(getattr(function, "_init_fn", function)).parameters)
