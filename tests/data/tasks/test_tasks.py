"""Tasks of any tokenizer and length: rows exactly full, repeatable, and the same but for the answer."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from helpers.lanes import by_lane
from helpers.tokenizers import MAKE, byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.tasks.catalog import TASKS, chosen_tasks, samples
from longring.data.tasks.draws import Draws
from longring.data.tasks.knotted import Backtrace
from longring.data.tasks.material import Material
from longring.data.tasks.sample import (
    BASELINE,
    FIRST_REFERENCE,
    MAX_REFERENCES,
    NOT_SCORED,
    Sample,
    Tokens,
    TooShortError,
    references,
)
from longring.data.tasks.words import made_up_words
from tokenizers import Tokenizer, models

GENERATED = [name for name in TASKS if name != "prefix"]


class Numbered:
    """Documents whose tokens are those of a sentence, and sequences of the numbers 0, 1, ..."""

    def __init__(self, text: Tokens) -> None:
        self._text = text

    def text(self, num_tokens: int, draws: Draws) -> Tokens:
        return np.resize(self._text, (1 + num_tokens // 7, len(self._text)))[
            :, draws.distinct(len(self._text), 7)
        ].flatten()[:num_tokens]

    def continued(self, length: int, draws: Draws) -> tuple[Tokens, Tokens, int]:
        return np.arange(length + 1), np.full(length + 1, 7), length // 2


@cache
def material(make) -> Material:
    tokenizer = make()
    return Material(tokenizer, 0, Numbered(np.array(tokenizer.encode("the ring turns. it returns").ids)))


def made(make, name: str, length: int, number: int = 0, seed: int = 1, distractors: int = 1) -> Sample:
    """Return a sample; at a length that is too short, one of the length that its error advises."""
    while True:
        try:
            return TASKS[name].make(material(make), length, number, distractors, Draws(seed, name, length, number))
        except TooShortError as error:
            told = str(error)
        assert told.startswith(f"length = {length}: ")
        assert told.endswith("; take a longer bucket, or give a greater length")
        length *= 2


# The word pieces know none of the tasks' words, so all answers are equal.
@pytest.mark.parametrize(
    "make", by_lane(MAKE[:-1], quick=[byte_level], slow=MAKE[1:-1]), ids=lambda make: make.__name__
)
@pytest.mark.parametrize("name", GENERATED)
@settings(max_examples=2)
@given(st.integers(1, 2000), st.integers(0, 100))
def test_rows_are_full_and_repeatable_and_differ_in_their_answers(make, name, length, number):
    sample = made(make, name, length, number)
    length = sample.length
    assert sample.rows.shape == (len(sample.parts), length + 1)
    assert (sample.rows[:, 0] == 0).all()
    # The longest candidate ends with the row, and nothing scored is missing from any.
    ends = [np.flatnonzero(part)[-1] for part in sample.parts]
    assert max(ends) == length - 1
    references = set(np.unique(sample.parts[0])) - {NOT_SCORED, BASELINE}
    assert references == set(range(FIRST_REFERENCE, FIRST_REFERENCE + len(references)))
    for row, part in zip(sample.rows[1:], sample.parts[1:], strict=True):
        begin = int(np.flatnonzero(sample.parts[0])[0]) + 1
        assert np.array_equal(row[:begin], sample.rows[0, :begin])
        assert not np.array_equal(row[begin:], sample.rows[0, begin:])
        assert set(np.unique(part)) == set(np.unique(sample.parts[0]))
    again, other = made(make, name, length, number), made(make, name, length, number, seed=2)
    assert np.array_equal(sample.rows, again.rows) and np.array_equal(sample.parts, again.parts)
    assert not np.array_equal(sample.rows[0], other.rows[0])


def test_other_numbers_of_a_sample_are_other_samples_and_cover_the_depths():
    found = list(samples("needle_single_2", material(byte_level), 400, count=40, distractors=0, seed=3))
    assert len({sample.rows.tobytes() for sample in found}) == 40
    assert sorted(sample.depth or 0.0 for sample in found) == pytest.approx(np.linspace(0, 1, 40))


@pytest.mark.full
def test_a_list_of_a_million_tokens_has_enough_words():
    """There are 70 ** 3 = 343,000 words of three syllables; a list of 1,048,576 tokens asks for 349,575 words."""
    for count, letters in ((1000, 6), (171_501, 8)):
        words = made_up_words(Draws(0), count)
        assert len(set(words)) == count and set(map(len, words)) == {letters}


def test_a_tokenizer_without_letters_has_no_automaton():
    """An unknown word is one token for all letters."""
    with pytest.raises(
        ValueError, match="evaluate.tasks = automaton: .* no token of its own .*; leave out the automaton"
    ):
        TASKS["automaton"].make(Material(Tokenizer(models.WordLevel({"?": 0}, "?")), 0), 500, 0, 0, Draws(0))


def test_a_backtrace_has_as_many_distractors_as_other_texts():
    with pytest.raises(
        ValueError, match="distractors = 4: the backtrace has 3 .*; ask for at most as many, or make more"
    ):
        Backtrace().make(material(byte_level), 3000, 0, 4, Draws(0))
    assert len(Backtrace().make(material(byte_level), 3000, 0, 3, Draws(0)).rows) == 4
    assert len(Backtrace(texts=5).make(material(byte_level), 3000, 0, 4, Draws(0)).rows) == 5


def test_an_answer_has_at_most_100_references():
    texts = [np.zeros(1, dtype=np.int64)] * (MAX_REFERENCES + 1)
    with pytest.raises(ValueError, match="at most 100 references, and these are 101; ask for fewer in a question"):
        references(texts)
    assert len(references(texts[1:])) == MAX_REFERENCES


def test_numbers_that_differ_are_as_many_as_there_are():
    with pytest.raises(ValueError, match="count = 4: only 3 different numbers are below 3; ask for at most as many"):
        Draws(0).distinct(3, 4)
    assert sorted(Draws(0).distinct(3, 3)) == [0, 1, 2]


def test_text_is_encoded_as_it_follows_other_text():
    for make in MAKE:
        tokenizer, found = make(), material(make)
        for before, text in (("ring", " turns"), (" 1", "2345"), ("a", "\n"), (".", " the ring")):
            whole, head = tokenizer.encode(before + text).ids, tokenizer.encode(before).ids
            merges = whole[: len(head)] != head
            expected = tokenizer.encode(text).ids if merges else whole[len(head) :]
            assert found.one(text, before).tolist() == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("copy_text", "a copy takes at least 4 tokens"),
        ("needle_single_2", "question and answer alone take [0-9]+ tokens"),
        ("thread_multiple", "no room for 9 pairs and those of the distractors"),
        ("uuid", "no room for 1 pair and those of the distractors"),
    ],
)
def test_a_task_that_is_too_long_for_a_row_fits_a_longer_one(name, reason):
    def sample(length: int) -> Sample:
        return TASKS[name].make(material(byte_level), length, 0, 1, Draws(0))

    length = {"thread_multiple": 600, "uuid": 300}.get(name, 1)
    with pytest.raises(TooShortError, match=f"length = {length}: {reason}; take a longer bucket, or give a greater le"):
        sample(length)
    assert sample(6000).length == 6000


def test_the_prefix_of_a_sequence_is_exchanged():
    sample = made(byte_level, "prefix", 64)
    row, other = sample.rows
    assert row.tolist() == list(range(65))
    assert other.tolist() == [7] * 32 + list(range(32, 65))
    # Token 32 follows the exchanged prefix, so the first target that is scored is token 33.
    assert np.flatnonzero(sample.parts[0]).tolist() == np.flatnonzero(sample.parts[1]).tolist() == list(range(32, 64))
    with pytest.raises(ValueError, match="tasks = prefix: .* no held-out documents; name prepared data, or leave out"):
        TASKS["prefix"].make(Material(byte_level(), 0), 64, 0, 0, Draws(0))


def test_tasks_are_chosen_by_name_or_group():
    assert list(chosen_tasks(["thread", "uuid"])) == ["thread_forward", "thread_reverse", "thread_multiple", "uuid"]
    with pytest.raises(
        ValueError, match="evaluate.tasks = needles: there is no such task; name some of .*needle.*"
    ) as error:
        chosen_tasks(["needles"])
    for name in str(error.value).partition("name some of ")[2].split(", "):
        assert chosen_tasks([name])
