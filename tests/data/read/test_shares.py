"""Shares of cells against the definition: named sums are right, and what has no name keeps its proportions."""

import itertools
import re
from math import fsum, log

import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.data.curriculum_config import CurriculumConfig
from longring.data.read.shares import WEIGHT_SUM, Cells, cycle_shares, fit, integer_weights, share_at

CELLS = Cells(
    lengths=(8, 16, 32), sources=("web", "books", "code"), tokens=((4000, 0, 800), (1600, 160, 320), (320, 2240, 0))
)
TOTAL = 9440


def sums(shares) -> dict[str, float]:
    """Return the share of each source, bucket and cell by name."""
    found = {f"@{length}": fsum(row) for length, row in zip(CELLS.lengths, shares, strict=True)}
    for index, source in enumerate(CELLS.sources):
        found[source] = fsum(row[index] for row in shares)
        found |= {f"{source}@{length}": row[index] for length, row in zip(CELLS.lengths, shares, strict=True)}
    return found


def test_without_names_the_shares_are_those_of_the_tokens():
    shares = fit(CELLS, {})
    assert shares == tuple(tuple(pytest.approx(count / TOTAL, rel=1e-15) for count in row) for row in CELLS.tokens)


@pytest.mark.parametrize(
    "named",
    [
        {"books": 0.4},
        {"@32": 0.6, "web": 0.2},
        {"books@32": 0.1},
        {"books@32": 0.3, "books": 0.3, "@8": 0.5},
        {"web": 0.5, "books": 0.25, "code": 0.25},
        {"@8": 0.2, "@16": 0.2, "@32": 0.6, "code": 0.1},
        {"web@8": 0.0, "code@16": 0.2},
        {"books": 0.0},
    ],
)
def test_named_sums_are_right_and_the_rest_is_natural(named: dict[str, float]):
    shares = fit(CELLS, named)
    found = sums(shares)
    assert {name: found[name] for name in named} == pytest.approx(named, abs=1e-12)
    assert fsum(itertools.chain(*shares)) == pytest.approx(1, rel=1e-14)
    # The nearest in relative entropy: of four free cells in two rows and two columns the odds ratio stays.
    free = [
        (b, s)
        for b, row in enumerate(shares)
        for s, share in enumerate(row)
        if share and f"{CELLS.sources[s]}@{CELLS.lengths[b]}" not in named
    ]
    for (a, b), (c, d) in itertools.combinations(free, 2):
        if {(a, d), (c, b)} <= set(free):
            ratios = [log(m[a][b] * m[c][d] / (m[a][d] * m[c][b])) for m in (shares, CELLS.tokens)]
            assert ratios[0] == pytest.approx(ratios[1], abs=1e-9)
    # Cells whose source and bucket have no name keep their proportions.
    loose = [cell for cell in free if CELLS.sources[cell[1]] not in named and f"@{CELLS.lengths[cell[0]]}" not in named]
    rates = [shares[b][s] / CELLS.tokens[b][s] for b, s in loose]
    assert not rates or max(rates) == pytest.approx(min(rates), rel=1e-9)


ERRORS = [
    ({"wbe": 0.3}, r"curriculum\.shares\.wbe: the data has no source 'wbe'; .* did you mean (web)\?", {"web": 0.3}),
    ({"wbe@8": 0.3}, r"shares\.wbe@8: .* did you mean (web@8)\?", {"web@8": 0.3}),
    ({"@33": 0.3}, r"shares\.@33: '33' is not a bucket in use; they are 8, 16, 32: did you mean (@32)\?", {"@32": 0.3}),
    ({"web@x": 0.3}, r"shares\.web@x: 'x' is not a bucket in use; .* did you mean (web@8)\?", {"web@8": 0.3}),
    ({"code@32": 0.3}, r"shares\.code@32: has no training sequences; (remove it), or prepare documents", {}),
    (
        {"web": 0.7, "books": 0.4},
        r"{web = 0\.7, books = 0\.4}: these shares of sources sum to 1\.1 .*; lower them to at (most 1)",
        {"web": 0.6, "books": 0.4},
    ),
    ({"@8": 0.7, "web@16": 0.4}, r"these shares of buckets sum to 1\.1 .*; lower them to at (most 1)", {"@8": 0.6}),
    (
        {"web": 0.3, "books": 0.3, "code": 0.3},
        r"these shares of sources sum to 0\.9 .* raise them to 1 in all, or (leave one out)",
        {"web": 0.3, "books": 0.3},
    ),
    (
        {"@8": 0.3, "books": 0.8},
        r"shares\.\S+ = 0\..*: cannot hold .* together with .*; (remove it), or change the others",
        {"books": 0.8},
    ),
    (
        {"books": 0.2, "books@32": 0.4},
        r"shares\.books = 0\.2: cannot hold .* books@32.*; (remove it)",
        {"books@32": 0.4},
    ),
]


@pytest.mark.parametrize(("wrong", "message", "right"), ERRORS)
def test_shares_that_do_not_fit_are_one_line_whose_advice_works(wrong: dict, message: str, right: dict):
    with pytest.raises(ValueError, match=message) as error:
        fit(CELLS, wrong, " at progress 0.5")
    assert "\n" not in str(error.value)
    advice = re.search(message, str(error.value))
    assert advice is not None
    fit(CELLS, right)


def test_a_contradiction_names_a_share_whose_removal_helps():
    named = {"@8": 0.3, "@16": 0.1, "books": 0.75}
    with pytest.raises(ValueError, match="cannot hold") as error:
        fit(CELLS, named)
    found = re.match(r"curriculum\.shares\.(\S+) = ", str(error.value))
    assert found is not None
    fit(CELLS, {name: share for name, share in named.items() if name != found[1]})


def test_a_share_over_the_run_is_joined_by_straight_lines():
    share = ((0.2, 0.1), (0.6, 0.5), (0.6, 0.2), (1.0, 0.3))
    expected = {0.0: 0.1, 0.2: 0.1, 0.3: 0.2, 0.5: 0.4, 0.6: 0.2, 0.8: 0.25, 1.0: 0.3}
    assert {at: share_at(share, at) for at in expected} == pytest.approx(expected)
    config = CurriculumConfig(shares={"books": ((0.0, 0.1), (1.0, 0.5)), "@8": 0.4})
    found = [sums(shares) for shares in cycle_shares(CELLS, config, [0.125, 0.375, 0.625, 0.875])]
    assert [one["books"] for one in found] == pytest.approx([0.15, 0.25, 0.35, 0.45])
    assert [one["@8"] for one in found] == pytest.approx([0.4] * 4)
    config = CurriculumConfig(shares={"books": ((0.0, 0.1), (1.0, 0.9)), "web": 0.3})
    with pytest.raises(ValueError, match=r"sum to 1\.1 at progress 0\.875; lower them"):
        cycle_shares(CELLS, config, [0.125, 0.875])


def test_shares_nearly_without_room_hold_within_a_thousandth():
    """All of bucket 32 beside books has to vanish, to which the fitting converges slowly."""
    shares = fit(CELLS, {"books": 0.5, "@32": 0.5, "@16": 0.2, "books@16": 0.0})
    assert sums(shares)["books@32"] == pytest.approx(0.5, abs=1e-3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda shares: sum(shares) > 1e-6))
def test_integer_weights_sum_to_the_whole_and_are_in_proportion(shares: list[float]):
    weights = integer_weights(shares)
    assert sum(weights) == WEIGHT_SUM
    for share, weight in zip(shares, weights, strict=True):
        assert weight >= 0
        assert weight / WEIGHT_SUM == pytest.approx(share / fsum(shares), abs=1e-12)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (((0.5, 0.1), (0.2, 0.3)), r"curriculum\.shares\.web = \[\[0\.5, 0\.1\], \[0\.2, 0\.3\]\]: .*; sort them"),
        ((), "sort"),
    ],
)
def test_points_ascend(points, message: str):
    with pytest.raises(ValueError, match=message):
        CurriculumConfig(shares={"web": points})
    CurriculumConfig(shares={"web": ((0.2, 0.3), (0.5, 0.1))})
