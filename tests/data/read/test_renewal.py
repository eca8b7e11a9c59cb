"""Renewed shares against Skill-it's rule as written, and the held-out sequences from which they follow."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.data.config import DataConfig, LoaderConfig, SourceConfig, TokenizerConfig
from longring.data.curriculum_config import CurriculumConfig, RenewalConfig
from longring.data.format.manifest import Manifest
from longring.data.prepare.prepare import prepare
from longring.data.read.batch_order import BatchOrder
from longring.data.read.mix import buckets_in_use, plan_mix, training_order
from longring.data.read.renewal import Renewal, held_out_sequences, renewed
from longring.data.read.shares import Cells, fit
from rich.console import Console

SOURCES = ("books", "code", "web")
EQUAL = Cells(lengths=(8,), sources=SOURCES, tokens=((80, 80, 80),))
UNEQUAL = Cells(lengths=(8, 16, 32), sources=SOURCES, tokens=((4000, 0, 800), (1600, 160, 320), (320, 2240, 0)))
GRAPH = {"books": {"code": 0.5}, "code": {"code": 0.0, "web": 0.25}}
STEPS = 24

losses_of_rounds = st.lists(st.tuples(*[st.floats(0, 20)] * 3), max_size=5)


def of_rounds(rounds) -> list[Renewal]:
    """Return renewals with these losses of SOURCES."""
    return [Renewal(step, dict(zip(SOURCES, losses, strict=True))) for step, losses in enumerate(rounds, 1)]


@given(losses_of_rounds, st.floats(0, 2), st.integers(1, 6), st.sampled_from([{}, GRAPH]))
def test_from_equal_shares_the_mixture_is_that_of_algorithm_1(rounds, eta, window, graph):
    """p_i is proportional to exp(eta sum_j A_ij sum of the last w rounds' L_j), with losses of 1 before the first."""
    found = renewed(fit(EQUAL, {}), EQUAL, curriculum(eta, window=window, graph=graph), of_rounds(rounds))
    adjacency = np.array([[graph.get(i, {}).get(j, float(i == j)) for j in SOURCES] for i in SOURCES])
    logits = eta * adjacency @ np.sum(rounds[-window:] or [(1, 1, 1)], axis=0)
    expected = np.exp(logits - logits.max())
    assert found[0] == pytest.approx(expected / expected.sum(), rel=1e-12, abs=1e-300)


@given(losses_of_rounds, st.floats(0, 1))
def test_with_the_identity_and_every_round_it_is_multiplicative_weights(rounds, eta):
    weights = np.full(3, 1 / 3)
    for losses in rounds:
        weights = weights * np.exp(eta * np.array(losses))
        weights /= weights.sum()
    found = renewed(fit(EQUAL, {}), EQUAL, curriculum(eta, window=1000), of_rounds(rounds))
    assert found[0] == pytest.approx(weights, rel=1e-9, abs=1e-300)


@given(
    losses_of_rounds.filter(len),
    st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    st.sampled_from([{}, {"@16": 0.5}, {"books@8": 0.2}, {"web": 0.3, "@8": 0.2, "code@32": 0.1}, {"books": 0.0}]),
)
def test_named_buckets_and_cells_keep_their_shares_and_others_move_by_their_losses(rounds, eta, named):
    base = fit(UNEQUAL, named)
    found = np.array(renewed(base, UNEQUAL, replace(curriculum(eta), shares=named), of_rounds(rounds)))
    before = np.array(base)
    assert found.sum() == pytest.approx(1, rel=1e-12)
    assert (found >= 0).all() and not found[before == 0].any()
    rows, rest = [], []
    for bucket, length in enumerate(UNEQUAL.lengths):
        kept = [f"{source}@{length}" in named for source in SOURCES]
        assert found[bucket][kept] == pytest.approx(before[bucket][kept], rel=1e-15), "a named cell keeps its share"
        moved = [(bucket, index) for index in range(3) if not kept[index] and before[bucket][index]]
        if f"@{length}" in named:
            assert found[bucket].sum() == pytest.approx(named[f"@{length}"], rel=1e-9), "and so does a named bucket"
            rows.append(moved)
        else:
            rest += moved
    gains = eta * np.sum(rounds[-3:], axis=0)
    for group in (*rows, rest):
        if not group:
            continue
        logs = np.array([np.log(before[cell]) + gains[cell[1]] for cell in group])
        expected = np.exp(logs - logs.max())
        mass = sum(before[cell] for cell in group)
        assert [found[cell] for cell in group] == pytest.approx(mass * expected / expected.sum(), rel=1e-9, abs=1e-200)


def test_equal_losses_leave_the_shares_as_they_are_to_the_bit():
    base = fit(UNEQUAL, {"@16": 0.5})
    same = [Renewal(step, dict.fromkeys(SOURCES, 2.5)) for step in (1, 2)]
    assert renewed(base, UNEQUAL, replace(curriculum(0.7), shares={"@16": 0.5}), same) == base


@pytest.fixture(scope="module")
def manifests(tmp_path_factory, words: Callable[..., str], tokenizer_file: Path) -> dict[str, Manifest]:
    """Data of three sources, of one, and of three without held-out documents."""
    folder = tmp_path_factory.mktemp("sources")
    sources = {}
    for number, (name, count, size) in enumerate(zip(SOURCES, (24, 30, 12), (30, 7, 50), strict=True)):
        texts = [words(size + 3 * (index % 3), 100 * number + index) for index in range(count)]
        (folder / name).write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
        sources[name] = SourceConfig(kind="json", path=str(folder / name))
    tokenizer = TokenizerConfig(path=str(tokenizer_file))
    kinds = {"all": (sources, 0.3), "one": ({"books": sources["books"]}, 0.3), "trained": (sources, 0.0)}
    return {
        name: prepare(
            DataConfig(
                directory=str(folder / f"of-{name}"),
                min_bucket_tokens=8,
                max_bucket_tokens=32,
                held_out_fraction=held_out,
                sources=chosen,
                tokenizer=tokenizer,
            ),
            Console(quiet=True),
            workers=1,
        )
        for name, (chosen, held_out) in kinds.items()
    }


@pytest.fixture(scope="module")
def manifest(manifests: dict[str, Manifest]) -> Manifest:
    return manifests["all"]


def curriculum(rate: float = 0.1, **renewal) -> CurriculumConfig:
    return CurriculumConfig(cycles=4, renewal=RenewalConfig(rate=rate, **renewal))


def order_of(manifest: Manifest, config: CurriculumConfig, renewals=(), steps: int = STEPS) -> BatchOrder:
    return training_order(
        manifest, config, LoaderConfig(), steps=steps, global_batch_tokens=256, seed=3, renewals=renewals
    )


@pytest.mark.parametrize("mix", ["step", "micro_batch"])
def test_a_renewal_changes_no_step_before_it_and_those_after_it(manifest: Manifest, mix):
    config = replace(curriculum(1.0, window=2), mix=mix)
    losses = [(3.0, 1.0, 2.0), (1.0, 3.0, 2.0), (2.0, 1.0, 3.0)]
    renewals = [
        Renewal(step, dict(zip(SOURCES, of, strict=True))) for step, of in zip((6, 12, 18), losses, strict=True)
    ]
    orders = [order_of(manifest, config, renewals[:count]) for count in range(4)]
    for count, (before, after) in enumerate(pairwise(orders), 1):
        first = before.first_difference(after, STEPS)
        assert first is not None and 6 * count < first <= 6 * count + 6, "the first other step is in the next cycle"
    # The same records in any order, beside some at a step where no cycle ends and some of other sources.
    odd = [Renewal(7, dict.fromkeys(SOURCES, 9.0)), *reversed(renewals), Renewal(18, {"letters": 9.0})]
    assert orders[3].first_difference(order_of(manifest, config, odd), STEPS) is None


@given(tokens=st.integers(8, 2000))
def test_losses_are_measured_on_sequences_of_every_source_within_the_limit(manifest: Manifest, tokens: int):
    config = RenewalConfig(rate=1, held_out_tokens=tokens)
    cells = plan_mix(buckets_in_use(manifest, curriculum()), curriculum(), STEPS, 1).cells
    read: dict[str, int] = dict.fromkeys(SOURCES, 0)
    for bucket, numbers in held_out_sequences(manifest, cells, config):
        assert len(set(numbers.tolist())) == len(numbers)
        ends = np.cumsum([part.sequences for part in bucket.parts])
        for source, count in zip(
            SOURCES, np.bincount(np.searchsorted(ends, numbers, side="right"), minlength=3), strict=True
        ):
            read[source] += int(count) * bucket.length
    assert all(0 < count <= tokens for count in read.values())
    if tokens == 2000:
        whole = {s: manifest.ledgers[s].splits["held_out"].sequence_tokens() for s in SOURCES}
        assert all(read[source] >= min(2000 - 64, whole[source] // 2) for source in SOURCES)


WRONG: Mapping[str, tuple[CurriculumConfig, str, CurriculumConfig]] = {
    "unknown": (
        curriculum(graph={"boks": {"web": 1.0}}),
        r"the data has no source 'boks' to train; its sources are books, code, web: (rename) or remove it",
        curriculum(graph={"books": {"web": 1.0}}),
    ),
    "unknown target": (
        curriculum(graph={"books": {"wbe": 1.0}}),
        r"the data has no source 'wbe' to train; its sources are books, code, web: rename or (remove it)",
        curriculum(),
    ),
    "short": (
        curriculum(held_out_tokens=7),
        r"curriculum\.renewal\.held_out_tokens = 7: the shortest held-out sequence of source 'books' has (\d+) tokens; "
        "raise it to at least that",
        curriculum(held_out_tokens=8),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_renewed_is_one_line_whose_advice_works(manifest: Manifest, name: str):
    wrong, message, right = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        order_of(manifest, wrong)
    assert "\n" not in str(error.value)
    found = re.search(message, str(error.value))
    assert found is not None and (name != "short" or int(found[1]) == right.renewal.held_out_tokens)
    order_of(manifest, right)


def test_one_source_one_cycle_or_no_held_out_sequence_cannot_be_renewed(manifests: dict[str, Manifest]):
    manifest, lone, trained = manifests.values()
    with pytest.raises(ValueError, match=r"are too few for a second one .*; raise train\.steps, or set the rate to 0"):
        order_of(manifest, curriculum(), steps=3)
    order_of(manifest, curriculum(), steps=8)
    with pytest.raises(ValueError, match=r"curriculum\.cycles = 1; raise that to at least 2, or set the rate to 0"):
        replace(curriculum(), cycles=1)
    replace(curriculum(), cycles=2)
    with pytest.raises(ValueError, match=r"one source to train, books; set it to 0, or prepare documents of several"):
        order_of(lone, curriculum())
    order_of(lone, curriculum(0.0))
    advice = r"set it to 0, or prepare other data with a larger data\.held_out_fraction"
    with pytest.raises(ValueError, match=f"source 'books' has no held-out sequence in the buckets in use; {advice}"):
        order_of(trained, curriculum())
    order_of(trained, curriculum(0.0))
    order_of(manifest, curriculum())
