"""The rules of RULER and of Needle Threading, read off the text of samples by code that knows only the rules."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from longring.data.config import TokenizerConfig
from longring.data.prepare.train_tokenizer import train_tokenizer
from longring.data.tasks import variables as variables_module
from longring.data.tasks.catalog import samples
from longring.data.tasks.draws import Draws
from longring.data.tasks.material import Material
from longring.data.tasks.sample import FIRST_REFERENCE, TooShortError
from longring.data.tasks.variables import Variables
from tokenizers import Tokenizer

TOKENIZER = Tokenizer.from_buffer(train_tokenizer(["the secret number of a thing is 1234567."] * 9, TokenizerConfig()))
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NUMBER, WORD = r"[1-9][0-9]{6}", r"[a-z]+-[a-z]+"


def texts(name: str, length: int = 6000, count: int = 3) -> list[tuple[str, list[str], list[str]]]:
    """Return prompt, references and the references of the distractor of some samples."""
    found = []
    for sample in samples(name, Material(TOKENIZER, 0), length, count=count, distractors=1, seed=5):
        answers = []
        for row, parts in zip(sample.rows, sample.parts, strict=True):
            targets = [row[1:][parts == part].tolist() for part in range(FIRST_REFERENCE, parts.max() + 1)]
            answers.append([TOKENIZER.decode(ids).strip(' ,"') for ids in targets])
        begin = int(np.flatnonzero(sample.parts[0])[0]) + 1
        found.append((TOKENIZER.decode(sample.rows[0, 1:begin].tolist()), *answers))
    return found


# Name: type of key, type of value, statements about keys that are asked for, other statements (None: the haystack).
NEEDLES = {
    "needle_single_1": (WORD, NUMBER, 1, 0),
    "needle_single_2": (WORD, NUMBER, 1, 0),
    "needle_single_3": (WORD, UUID, 1, 0),
    "needle_multikey_1": (WORD, NUMBER, 1, 3),
    "needle_multikey_2": (WORD, NUMBER, 1, None),
    "needle_multikey_3": (UUID, UUID, 1, None),
    "needle_multivalue": (WORD, NUMBER, 4, 0),
    "needle_multiquery": (WORD, NUMBER, 4, 0),
}


@pytest.mark.parametrize("name", NEEDLES)
def test_needles(name):
    key, value, right, others = NEEDLES[name]
    for prompt, answer, wrong in texts(name):
        text, asked = prompt.rsplit("\n", 1)
        stated = re.findall(rf"^The secret (?:number|code) of ({key}) is ({value})\.$", text, re.MULTILINE)
        queried = set(re.findall(key, asked))
        assert [v for k, v in stated if k in queried and v in answer] != []
        assert sorted(v for k, v in stated if k in queried) == sorted(answer)
        assert len(answer) == right and len(queried) == (4 if name == "needle_multiquery" else 1)
        assert len({v for _, v in stated}) == len(stated)
        if name == "needle_multivalue":
            assert [v for k, v in stated if k in queried] == answer
        if name == "needle_multiquery":
            by_key = dict(stated)
            assert answer == [by_key[k] for k in re.findall(key, asked.partition("?")[0])]
        if others is None:
            assert len(stated) > 50
            assert len(text.splitlines()) < len(stated) + 5, "the haystack is nothing but needles"
        else:
            assert len(stated) == right + others
            before = re.split(rf"\nThe secret (?:number|code) of {key} is {value}\.\n", text)
            assert all(part.rstrip("\n").endswith(".") for part in before), "needles stand between whole sentences"
            assert not others or set(wrong) <= {v for _, v in stated}
        assert len(wrong) == right and not set(wrong) & set(answer)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("needle_single_1", r".+\n"),
        ("needle_single_2", r".+\n"),
        ("needle_multikey_1", r".+\n"),
        ("needle_multikey_2", r".+\n"),
        ("uuid", rf'"{UUID}": "{UUID}",\n'),
    ],
)
def test_the_depth_of_a_sample_is_where_its_needle_stands(name, line):
    """A depth is a share of the characters before the question, to within a line and the prompt's head."""
    material = Material(TOKENIZER, 0)
    for sample, (prompt, [answer], _) in zip(
        samples(name, material, 6000, count=8, distractors=1, seed=5), texts(name, count=8), strict=True
    ):
        assert sample.depth is not None
        context = prompt[: prompt.rindex("\n")]
        longest = max(len(found.group()) for found in re.finditer(line, context))
        assert abs(context.index(answer) - sample.depth * len(context)) < 3 * longest


def test_variables():
    for prompt, answer, wrong in texts("variables"):
        example, text = prompt.rsplit("\n\n", 2)[0], prompt
        assigned = re.findall(r"let ([A-Z]+) = ([A-Z]+|[0-9]{5});", text)
        chain = [(name, source) for name, source in assigned if len(name) == 5]
        shown = [(name, source) for name, source in assigned if len(name) == 3]
        for links in (chain, shown):  # four hops, in the order of the text
            assert len(links) == 5 and links[0][1].isdigit()
            assert all(second[1] == first[0] for first, second in pairwise(links))
        assert [name for name, _ in chain] == answer
        assert f"hold {chain[0][1]}?" in text
        assert " ".join(name for name, _ in shown) in example, "the example is solved"
        assert len(wrong) == 5 and not set(wrong) & set(answer)


def test_the_assignments_of_variables_stand_at_the_cuts_that_are_drawn(monkeypatch):
    """One of 25 positions is 7, and 7 / 25 * 25 is above 7."""
    drawn: list[list[int]] = []
    distinct = Draws.distinct

    def recorded(draws: Draws, stop: int, count: int) -> list[int]:
        drawn.append(distinct(draws, stop, count))
        return drawn[-1]

    monkeypatch.setattr(Draws, "distinct", recorded)
    monkeypatch.setattr(variables_module, "question", lambda *arguments: arguments[4](arguments[1]))  # the context
    material = Material(TOKENIZER, 0)
    for tokens in range(600, 700):
        found: Any = Variables().make(material, tokens, 0, 1, Draws("variables", tokens))
        parts = [segment.tokens for segment in found]
        cuts = material.cuts(np.concatenate(parts[::2]))  # of the haystack, without the assignments between its parts
        positions = np.cumsum([len(part) for part in parts[:-1:2]]).tolist()
        assert positions == sorted(cuts[drawn[-1]].tolist())


@pytest.mark.parametrize(
    ("length", "times", "example"),
    [(2500, (6, 1), (3, 1, 20)), (4095, (6, 1), (3, 1, 20)), (12000, (30, 3), (10, 3, 40))],
)
def test_common_words(length, times, example):
    for prompt, answer, wrong in texts("common_words", length):
        solved, text = prompt.split("\n\n")
        for part, (often, seldom), found in (
            (text, times, answer),
            (solved, example[:2], solved.rpartition(" are ")[2].split(", ")),
        ):
            numbered = re.findall(r" (\d+)\. ([a-z]+)", part)
            assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
            counts = Counter(word for _, word in numbered)
            assert sorted(set(counts.values())) == [seldom, often]
            assert {word for word, count in counts.items() if count == often} == set(found)
            assert len(found) == 10
            assert [word for word in counts if word in found] == found, "in the order of their first appearance"
        assert len(set(re.findall(r" \d+\. ([a-z]+)", solved))) == example[2]
        counts = Counter(re.findall(r" \d+\. ([a-z]+)", text))
        assert len(wrong) == 10 and all(counts[word] == times[1] for word in wrong)


def test_common_words_of_4096_tokens_stand_30_times():
    """Their words and the solved example then take more than that with a tokenizer that knows none of them."""
    with pytest.raises(TooShortError, match="no room for 10 common words|question and answer alone take"):
        texts("common_words", 4096)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("common_words", r"( [a-z]{6})( \d+\.)"),  # one more word, which stands once
        ("needle_multikey_2", rf"The secret number of {WORD} is {NUMBER}\.\n"),
        ("needle_multikey_3", rf"The secret code of {UUID} is {UUID}\.\n"),
        ("uuid", rf'"{UUID}": "{UUID}",\n'),
    ],
)
def test_a_context_has_as_many_units_as_fit(name, unit):
    for length in range(3000, 3040, 4):
        [(prompt, _, _)] = texts(name, length, count=1)
        noise = prompt.index("Some words" if name == "common_words" else "This is a" if name == "uuid" else "The text")
        longest = max(len(TOKENIZER.encode(found.group()).ids) for found in re.finditer(unit, prompt[noise:]))
        # Encoded again, the noise has at most one token more or less.
        assert len(TOKENIZER.encode(prompt[:noise]).ids) <= longest + 1


def test_frequent_words():
    for prompt, answer, wrong in texts("frequent_words"):
        words = prompt.split("\n")[-2].split()
        ranked = Counter(words).most_common()
        assert ranked[0][0] == "..." and answer == [word for word, _ in ranked[1:4]]
        assert {len(word) for word in words} == {3, 6}
        total = (ranked[0][1] + 0.5) * np.pi**2 / 6  # up to rounding down, a word's count is total / zeta(2) / rank^2
        for rank, (_, count) in enumerate(ranked, 1):
            assert abs(count + 0.5 - total * 6 / np.pi**2 / rank**2) <= 1
        assert len(wrong) == 3 and not set(wrong) & set(answer)


@pytest.mark.parametrize(
    ("name", "hops", "threads"),
    [("uuid", 1, 1), ("thread_forward", 5, 1), ("thread_reverse", 5, 1), ("thread_multiple", 3, 3)],
)
def test_threads(name, hops, threads):
    for prompt, answer, wrong in texts(name):
        begin, end = prompt.index("{"), prompt.index("}") + 1
        pairs = json.loads(prompt[begin:end].replace(",\n}", "}"))
        position = {key: index for index, key in enumerate(pairs)}
        assert all(re.fullmatch(UUID, text) for pair in pairs.items() for text in pair)
        starts = re.findall(UUID, prompt[end:])
        assert len(starts) == threads == len(answer)
        for start, last in zip(starts, answer, strict=True):
            thread = [start]
            while thread[-1] in pairs:
                thread.append(pairs[thread[-1]])
            assert len(thread) == hops + 1 and thread[-1] == last
            order = [position[key] for key in thread[:-1]]
            assert order == sorted(order, reverse=name == "thread_reverse")
        assert sum(value in pairs for value in pairs.values()) == (hops - 1) * threads, "no other threads"
        assert all(value in pairs.values() for value in wrong)


def test_backtrace():
    for prompt, answer, wrong in texts("backtrace"):
        labels = re.findall(r"\[([A-Za-z0-9]{6})\]", prompt)
        assert len(labels) == 12
        heads = re.findall(r"\[([A-Za-z0-9]{6})\] (?:\((\d)\))?", prompt)
        number = {label: int(head or 1) for label, head in heads}
        assert [number[label] for label in answer] == [1, 2, 3] == [number[label] for label in wrong]
        assert answer[-1] == labels[-1] and not set(answer) & set(wrong)
        assert [label for label in labels if label in answer] == answer


def test_automaton():
    """Every string before the last one could be made by the automaton that the accepted symbols describe."""
    material = Material(TOKENIZER, 0)
    for sample in samples("automaton", material, 3000, count=5, distractors=1, seed=2):
        targets, scored = sample.rows[0, 1:], np.flatnonzero(sample.parts[0])
        assert len(scored) == 50
        accepted: dict[int, set[int]] = {}
        for position, token in sample.accepted.tolist():
            accepted.setdefault(position, set()).add(token)
        assert list(accepted) == scored.tolist()
        assert all(targets[position] in accepted[position] for position in scored.tolist())
        assert {len(tokens) for tokens in accepted.values()} <= {1, 2, 3, 4}
        strings = "".join(TOKENIZER.decode(targets[: scored[0]].tolist())).splitlines()[:-1]
        symbols = {TOKENIZER.decode([token]).strip() for token in set().union(*accepted.values())}
        first = {TOKENIZER.decode([token]).strip() for token in accepted[int(scored[0])]}
        strings = [string for string in strings if set(string) <= set("abcdefghijklmnopqr ")]  # without the filler
        strings = [string.replace(" ", "") for string in strings]
        assert len(strings) > 40 and all(string[0] in first for string in strings)
        assert all(len(string) <= 50 for string in strings)
        assert symbols <= set("abcdefghijklmnopqr")


def test_copies():
    for name in ("copy_text", "copy_random"):
        for sample in samples(name, Material(TOKENIZER, 0), 501, count=2, distractors=3, seed=2):
            row, parts = sample.rows[0], sample.parts[0]
            assert len(sample.rows) == 1 and row[0] == row[1] == 0
            assert np.array_equal(row[2:252], row[252:])
            assert (parts == 1).sum() == (parts == FIRST_REFERENCE).sum() == 249
            assert np.flatnonzero(parts == FIRST_REFERENCE).tolist() == list(range(252, 501))
