"""Ranges of numbers, which stand with the fields of dataclasses as `Annotated[int, Interval(ge=1, le=8)]`."""

import functools
import operator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Interval

_LIMITS = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}
_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


def limits_missed(value: float, bounds: Interval) -> str:
    """Return the limits of an interval, as "at least 1 and at most 8", if the number is outside, else "".

    nan is in no interval, and inf in no bounded one.
    """
    limits = [(*limit, end) for name, limit in _LIMITS.items() if (end := getattr(bounds, name)) is not None]
    inside = all(holds(value, end) for _, holds, end in limits)
    return "" if inside else " and ".join(f"{word} {end}" for word, _, end in limits)


def check_ranges(settings: Any) -> None:
    """Raise ValueError unless the numbers of a dataclass are of their types and in their ranges.

    The same holds for names that are one of several; lists, tables and their elements are checked as well.
    """
    kind = type(settings)
    for name, hint in _hints(kind).items():
        _check(hint, getattr(settings, name), f"{kind.__name__}.{name}")


def _check(hint: Any, value: Any, name: str) -> None:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):  # one value, or several
        _check(inner[isinstance(value, list | tuple)], value, name)
    elif origin is dict:
        for key, element in value.items():
            _check(inner[1], element, f"{name}[{key!r}]")
    elif origin is tuple:
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(value) != len(kinds):
            raise ValueError(f"{name} = {value!r}: has {len(value)} elements; give exactly {len(kinds)} numbers")
        for index, element in enumerate(value):
            _check(kinds[index], element, f"{name}[{index}]")
    elif origin is Literal and value not in inner:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, inner))}")
    elif origin is Annotated:
        number, bounds = inner
        if isinstance(value, bool) or not isinstance(value, int | number):
            raise ValueError(f"{name} = {value!r}: must be of type {number.__name__}")
        if limits := limits_missed(value, bounds):
            raise ValueError(f"{name} = {value!r}: must be {limits}")
