"""The three lanes of the tests: quick, full and slow, as marks of the parameters of large matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def by_lane(values: Iterable[Any], *, quick: Iterable[Any], slow: Iterable[Any] = ()) -> list[Any]:
    """Return the values as parameters of a test, each marked with its lane.

    Values in `quick` are unmarked and run in every lane; those in `slow` run in `make test-slow` alone; all others are
    marked `full` and run in `make test`. A test with several such matrices takes the slowest of their lanes. A tuple is
    one value for each of several parameters.
    """
    values, quick, slow = list(values), list(quick), list(slow)
    unknown = [value for value in (*quick, *slow) if value not in values]
    assert not unknown, f"{unknown} are not among {values}"
    assert not [value for value in quick if value in slow], "a value has one lane"
    marks = [[] if value in quick else [pytest.mark.slow if value in slow else pytest.mark.full] for value in values]
    return [
        pytest.param(*(value if type(value) is tuple else (value,)), marks=found)
        for value, found in zip(values, marks, strict=True)
    ]
