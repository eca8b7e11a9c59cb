"""Curves keep every value in some bin, and files are read as they grow."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.small_run import append
from hypothesis import given
from hypothesis import strategies as st
from longring.launch.records import numbers_of
from longring.launch.report.curves import Curves
from longring.launch.report.tail import Tail

VALUES = st.dictionaries(st.sampled_from("ab"), st.floats(-1e9, 1e9), max_size=2)


@given(st.dictionaries(st.integers(1, 500), VALUES, min_size=1), st.integers(1, 9))
def test_a_curve_holds_every_value(steps, most):
    curves, read_often = Curves(most), Curves(most)
    for step, values in sorted(steps.items()):
        curves.add(step, {"tokens": 8.0 * step, **values})
        read_often.add(step, {"tokens": 8.0 * step, **values})
        read_often.names()
    for name in ("tokens", "a", "b"):
        expected = [{"tokens": 8.0 * step, **values}.get(name) for step, values in sorted(steps.items())]
        expected = [value for value in expected if value is not None]
        for curve in (curves.curve(name), read_often.curve(name), curves.curve(name).coarser(2)):
            assert len(curve.mean) <= most
            assert curve.number.sum() == len(expected)
            assert (np.diff(curve.tokens) > 0).all()
            np.testing.assert_allclose((curve.mean * curve.number).sum(), sum(expected), rtol=1e-9, atol=1e-3)
            assert ((curve.low - 1e-3 <= curve.mean) & (curve.mean <= curve.high + 1e-3)).all()
            if expected:
                assert (curve.low.min(), curve.high.max()) == (min(expected), max(expected))


def test_the_tokens_of_a_step_lie_between_those_of_its_bin():
    curves = Curves(most=4)
    for step in range(1, 101):
        curves.add(step, {"tokens": 10.0 * step})
    assert curves.tokens_at(0) == 0
    assert curves.tokens_at(50) == pytest.approx(500, rel=0.02)


def test_numbers_of_a_record():
    record = {"a": 1, "b": {"64": {"loss": 2.5}}, "c": None, "d": "x", "e": True, "f": 10**400, "g": float("nan")}
    assert dict(numbers_of(record)) == {"a": 1, "b/64/loss": 2.5}


def test_a_file_is_read_as_it_grows(tmp_path):
    file = tmp_path / "metrics.jsonl"
    tail, end = Tail(file), Tail(file, last_bytes=30)

    def new(reader: Tail) -> tuple[bool, list]:
        replaced, records = reader.read()
        return replaced, [record["step"] for record in records]

    assert new(tail) == (False, [])
    append(file, {"step": 1}, {"step": 2}, {"step": 3})
    assert new(tail) == (True, [1, 2, 3])
    assert new(end) == (True, [2, 3]), "no part of a line is a record"
    text = json.dumps({"step": 4}) + "\n"
    for part in (text[:5], text[5:]):
        with file.open("a") as stream:
            stream.write(part)
        found = new(tail)
    assert found == (False, [4]), "a line is read when it is whole"
    with file.open("a") as stream:
        stream.write("{broken\n")
    append(file, {"step": 5})
    assert new(tail) == (False, [5])
    # A run that goes back before a spike replaces the file.
    other = tmp_path / "other"
    append(other, {"step": 1}, {"step": 2})
    other.rename(file)
    assert new(tail) == (True, [1, 2])
