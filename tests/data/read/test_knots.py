"""Untie the Knots: compared with a direct transcription, and tied rows are parsed back into documents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format.tokenizer import DocumentTokenizer, knot_tokens
from longring.data.order_config import KnotsConfig
from longring.data.prepare.train_tokenizer import train_tokenizer, with_knot_tokens
from longring.data.read.knots import LABEL_CHARACTERS, Knots, Tied, cut_points, fit_to_length
from longring.data.read.loader import read_rows

CHUNKS = 4
B = 0


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    config = TokenizerConfig(vocab_size=300, knot_chunks=CHUNKS)
    return DocumentTokenizer(train_tokenizer(["the ring turns a token home"] * 9, config), config.boundary)


def text(generator: np.random.Generator, count: int) -> list[int]:
    """Return `count` random tokens, none of them special."""
    return generator.integers(20, 300, count).tolist()


def row_of(sizes: list[int], length: int, *, begins_inside: bool, seed: int = 0) -> np.ndarray:
    """Return a row [length + 1] of documents of `sizes` tokens, each with its boundary; the end is cut or filled."""
    generator = np.random.default_rng(seed)
    tokens = [] if begins_inside else [B]
    for size in sizes:
        tokens += [*text(generator, size), B]
    tokens += text(generator, max(0, length + 1 - len(tokens)))
    return np.array(tokens[: length + 1], dtype=np.uint16)


class Parsed:
    """The chunks and backtraces of a tied row, parsed by its special tokens alone."""

    def __init__(self, tokens: list[int], tokenizer: DocumentTokenizer):
        names = {tokenizer.tokenizer.token_to_id(name): name for name in knot_tokens(CHUNKS)}
        self.chunks: list[dict[str, Any]] = []
        self.traces: list[tuple[int, list[str]]] = []
        """(index of the chunk that the backtrace follows, labels)."""
        position = 1

        def until(name: str) -> list[int]:
            nonlocal position
            begin = position
            while names.get(tokens[position]) not in (name, "<|then|>"):
                position += 1
            return tokens[begin:position]

        while position < len(tokens):
            name = names.get(tokens[position], "")
            position += 1
            if name == "<|label|>":
                label = tokenizer.tokenizer.decode(until("<|/label|>"))
                position += 1
                self.chunks.append({"label": label, "text": [], "head": 0, "tail": 0})
            elif name.startswith("<|head_"):
                assert not self.chunks[-1]["text"]
                self.chunks[-1]["head"] = int(name[7:-2])
            elif name.startswith("<|tail_"):
                self.chunks[-1]["tail"] = int(name[7:-2])
            elif name == "<|trace|>":
                labels = [tokenizer.tokenizer.decode(until("<|/trace|>"))]
                while names[tokens[position]] == "<|then|>":
                    position += 1
                    labels.append(tokenizer.tokenizer.decode(until("<|/trace|>")))
                position += 1
                self.traces.append((len(self.chunks) - 1, labels))
            else:
                after_end = not self.chunks or self.chunks[-1]["tail"] or self.chunks[-1]["text"][-1:] == [B]
                traced = self.traces and self.traces[-1][0] == len(self.chunks) - 1
                if after_end or traced:
                    self.chunks.append({"label": None, "text": [], "head": 0, "tail": 0})
                self.chunks[-1]["text"].append(tokens[position - 1])


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 60), max_size=8),
    begins_inside=st.booleans(),
    seed=st.integers(0, 1_000),
    odds=st.sampled_from([(0.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.0, 1.0)]),
)
def test_documents_can_be_tied_together_again(
    tokenizer: DocumentTokenizer, sizes: list[int], begins_inside: bool, seed: int, odds: tuple[float, ...]
):
    """Labels and backtraces alone give every document, the last one too; missing text was cut from the end."""
    length = 256
    row = row_of(sizes, length, begins_inside=begins_inside, seed=seed)
    config = KnotsConfig(share=1.0, chunk_odds=odds, min_document_tokens=4, min_sequence_tokens=1)
    result = Knots(config, tokenizer, 1).tie(row, seed)
    assert result is not None
    tied, _ = result
    assert len(tied) == length + 1
    assert tied[0] == B
    parsed = Parsed(tied.tolist(), tokenizer)
    by_label = {chunk["label"]: chunk for chunk in parsed.chunks if chunk["label"]}
    assert all(len(label) == 6 and set(label) <= set(LABEL_CHARACTERS) for label in by_label)
    documents, in_traces = [], []
    for last_chunk, labels in parsed.traces:
        chunks = [by_label[label] for label in labels]
        assert [chunk["head"] for chunk in chunks] == [0, *range(2, len(chunks) + 1)]
        assert [chunk["tail"] for chunk in chunks] == [*range(1, len(chunks)), 0]
        order = [parsed.chunks.index(chunk) for chunk in chunks]
        assert order == sorted(order), "chunks keep their order"
        assert order[-1] == last_chunk, "the backtrace follows the document's last chunk"
        in_traces += labels
        documents.append([token for chunk in chunks for token in chunk["text"]])
    assert sorted(in_traces) == sorted(by_label), "every label is named once, those of the last document too"
    documents += [chunk["text"] for chunk in parsed.chunks if not chunk["label"]]
    # The documents of the row; marks take the room of text at its end.
    taken = sum(map(len, documents))
    source = row.tolist()[int(row[0] == B) :][:taken]
    expected: list[list[int]] = [[]]
    for token in source:
        expected[-1].append(token)
        if token == B:
            expected.append([])
    assert sorted(documents) == sorted(document for document in expected if document)


def transcribed_mask(tokens: list[int], tokenizer: DocumentTokenizer, first_is_others: list[int]) -> list[bool]:
    """Return the mask of trained targets by the rules of the released code, token by token."""
    ids = {name: tokenizer.tokenizer.token_to_id(name) for name in knot_tokens(CHUNKS)}
    knots = {found for name, found in ids.items() if "head" in name or "tail" in name}
    trained = [True] * (len(tokens) - 1)
    inside = False
    for position in range(len(tokens) - 1):
        one, label = tokens[position : position + 2]
        if one == ids["<|label|>"]:
            inside = True
        if one in knots or label in knots or inside or label == ids["<|label|>"]:
            trained[position] = False
        if one == ids["<|/label|>"]:
            inside = False
        if label == ids["<|trace|>"] or one == ids["<|/trace|>"]:
            trained[position] = False
        if position + 1 in first_is_others:
            trained[position] = False
    return trained


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(5, 60), max_size=6), begins_inside=st.booleans(), seed=st.integers(0, 1_000))
def test_the_loss_leaves_out_knots_and_labels(
    tokenizer: DocumentTokenizer, sizes: list[int], begins_inside: bool, seed: int
):
    row = row_of(sizes, 200, begins_inside=begins_inside, seed=seed)
    row[0] = 19 if begins_inside else B  # 19: a token that the rest of the row lacks
    row[1:][row[1:] == 19] = 21
    config = KnotsConfig(share=1.0, chunk_odds=(1.0, 1.0, 1.0), min_document_tokens=4, min_sequence_tokens=1)
    result = Knots(config, tokenizer, 1).tie(row, seed)
    assert result is not None
    tied, trained = result
    others = [position for position, token in enumerate(tied.tolist()) if token == 19]
    assert len(others) == begins_inside, "the piece's first input is kept, and it is not a target"
    assert trained.tolist() == transcribed_mask(tied.tolist(), tokenizer, others)
    # The labels of a backtrace, the marks between them and its end are trained.
    ids = {name: tokenizer.tokenizer.token_to_id(name) for name in knot_tokens(CHUNKS)}
    targets = tied[1:]
    assert np.all(trained[(targets == ids["<|then|>"]) | (targets == ids["<|/trace|>"])])


def transcribed(documents: list[Tied], draws: np.random.Generator, marks: Any, *, keep_order: bool) -> list[int]:
    """Return the mixed tokens by appendix B over lists: marked chunks, one permutation, sorted slots, backtraces."""
    chunks: list[tuple[int, list[int]]] = []
    free = sum(document.num_chunks for document in documents) - (documents[-1].tokens[-1] != B)
    keys = draws.random(free).tolist()
    for number, document in enumerate(documents):
        tokens = document.tokens.tolist()
        if not document.labels:
            chunks.append((number, tokens))
            continue
        count = len(document.labels)
        bounds = [0, *cut_points(len(tokens), count, draws), len(tokens)]
        for chunk in range(count):
            head = [marks.heads[chunk - 1]] if chunk > 0 else []
            tail = [marks.tails[chunk]] if chunk < count - 1 else []
            label = [marks.label, *document.labels[chunk], marks.label_end]
            chunks.append((number, label + head + tokens[bounds[chunk] : bounds[chunk + 1]] + tail))
    # Key i belongs to position i: chunk c goes to the position of the c-th smallest key.
    positions = sorted(range(free), key=keys.__getitem__) + list(range(free, len(chunks)))
    if keep_order:
        for number in range(len(documents)):
            mine = [chunk for chunk, (owner, _) in enumerate(chunks) if owner == number]
            for chunk, position in zip(mine, sorted(positions[chunk] for chunk in mine), strict=True):
                positions[chunk] = position
    laid: list[tuple[int, list[int]]] = [(0, [])] * len(chunks)
    for chunk, position in zip(chunks, positions, strict=True):
        laid[position] = chunk
    result = []
    for position, (number, tokens) in enumerate(laid):
        result += tokens
        labels = documents[number].labels
        if labels and all(owner != number for owner, _ in laid[position + 1 :]):
            result.append(marks.trace)
            for nth, label in enumerate(labels):
                result += [marks.then] * (nth > 0) + label
            result.append(marks.trace_end)
    return result


@settings(max_examples=150)
@given(
    counts=st.lists(st.integers(1, CHUNKS), min_size=1, max_size=6),
    ended=st.booleans(),
    keep_order=st.booleans(),
    seed=st.integers(0, 1_000),
)
def test_mixing_follows_the_paper(
    tokenizer: DocumentTokenizer, counts: list[int], ended: bool, keep_order: bool, seed: int
):
    generator = np.random.default_rng(seed)
    documents = []
    for number, count in enumerate(counts):
        tokens = text(generator, int(generator.integers(count, 30)))
        tokens += [B] * (number + 1 < len(counts) or ended)
        labels = [text(generator, 3) for _ in range(count)] if count > 1 else []
        documents.append(Tied(np.array(tokens), np.zeros(len(tokens), dtype=np.int8), labels, 0))
    knots = Knots(KnotsConfig(share=1.0, chunk_odds=(1,) * CHUNKS, keep_order=keep_order), tokenizer, 0)
    found, _ = knots.mix(documents, np.random.default_rng(seed + 1))
    draws = np.random.default_rng(seed + 1)
    assert found.tolist() == transcribed(documents, draws, knots.marks, keep_order=keep_order)
    if not ended:
        last = documents[-1].tokens.tolist()[-1]
        assert found.tolist()[-1] in (last, knots.marks and knots.marks.trace_end), "the last chunk ends the sequence"


@settings(max_examples=200)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3), st.integers(0, 30)), min_size=1, max_size=6),
    less=st.integers(0, 5),
)
def test_text_makes_room_for_marks_at_the_end(sizes: list[tuple[int, int, int]], less: int):
    documents, first = [], 0
    for size, count, marks in sizes:
        tied = 1 < count <= size
        tokens = np.arange(first, first + size)
        documents.append(Tied(tokens, np.zeros(size, dtype=np.int8), [[1]] * count * tied, marks * tied))
        first += size
    length = max(1, first - less)
    kept = fit_to_length(documents, length)
    assert sum(len(one.tokens) + one.num_marks for one in kept) == length
    assert [token for one in kept for token in one.tokens.tolist()] == list(range(sum(len(one.tokens) for one in kept)))
    assert all(len(one.tokens) >= one.num_chunks for one in kept)
    # Only documents at the end lost their labels.
    labelled = [bool(one.labels) for one in kept]
    wanted = [bool(one.labels) for one in documents[: len(kept)]]
    changed = [index for index, (one, other) in enumerate(zip(labelled, wanted, strict=True)) if one != other]
    assert not any(labelled[changed[0] :]) if changed else labelled == wanted


def test_cut_points_are_equally_likely():
    generator = np.random.default_rng(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6_000):
        points = tuple(cut_points(6, 3, generator))
        counts[points] = counts.get(points, 0) + 1
    assert len(counts) == 10  # two of 1, ..., 5
    assert all(500 < count < 700 for count in counts.values())
    assert cut_points(3, 3, generator) == [1, 2]
    assert cut_points(9, 1, generator) == []


def test_knots_are_a_pure_function_of_seed_and_sequence(tokenizer: DocumentTokenizer):
    row = row_of([40, 30, 50], 200, begins_inside=False)
    config = KnotsConfig(share=0.5, min_document_tokens=4, min_sequence_tokens=1)
    before, again = Knots(config, tokenizer, 3), Knots(config, tokenizer, 3)
    first = [before.tie(row, number) for number in range(200)]
    for number in reversed(range(200)):
        other, one = again.tie(row, number), first[number]
        assert (one is None) == (other is None)
        assert one is None or (np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1]))  # type: ignore[index]
    tied = [one[0].tolist() for one in first if one is not None]
    assert 70 < len(tied) < 130
    assert len(set(map(tuple, tied))) == len(tied), "each sequence has its own knots"
    seeded = Knots(config, tokenizer, 4)
    assert [seeded.tie(row, number) is None for number in range(200)] != [one is None for one in first]
    shorter = Knots(KnotsConfig(share=1.0, min_sequence_tokens=201), tokenizer, 3)
    assert all(shorter.tie(row, number) is None for number in range(50))


class Stored:
    """A stand-in for a reader: rows of two documents each, which begin at positions 0 and 151."""

    length = 256

    def read(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return np.stack([row_of([150], self.length, begins_inside=False, seed=index) for index in indices.tolist()])

    def document_starts(self, indices: np.ndarray) -> list[tuple[int, ...]]:
        return [(0, 151) for _ in indices]


def test_a_tied_row_is_one_document_and_the_others_keep_theirs(tokenizer: DocumentTokenizer):
    """The chunks of a tied row belong to each other, so attention must see across the documents it is made of."""
    config = KnotsConfig(share=0.5, min_document_tokens=1, min_sequence_tokens=1)
    stored: Any = Stored()
    rows, starts, trained = read_rows(stored, np.arange(40), True, Knots(config, tokenizer, 3))
    before = stored.read(np.arange(40))
    assert starts is not None
    assert trained is not None
    tied = [not np.array_equal(*pair) for pair in zip(rows, before, strict=True)]
    assert 10 < sum(tied) < 30
    assert [not mask.all() for mask in trained] == tied
    assert list(starts) == [(0,) if one else (0, 151) for one in tied]


def test_short_documents_stay_whole(tokenizer: DocumentTokenizer):
    row = row_of([40, 9, 50], 150, begins_inside=False)
    config = KnotsConfig(share=1.0, chunk_odds=(0.0, 1.0), min_document_tokens=11, min_sequence_tokens=1)
    result = Knots(config, tokenizer, 0).tie(row, 0)
    assert result is not None
    parsed = Parsed(result[0].tolist(), tokenizer)
    whole = [chunk["text"] for chunk in parsed.chunks if not chunk["label"]]
    assert row.tolist()[42:52] in whole


def test_without_backtrace_there_is_none(tokenizer: DocumentTokenizer):
    config = KnotsConfig(share=1.0, min_document_tokens=4, min_sequence_tokens=1, backtrace=False)
    result = Knots(config, tokenizer, 0).tie(row_of([40, 30, 50], 200, begins_inside=False), 0)
    assert result is not None
    parsed = Parsed(result[0].tolist(), tokenizer)
    assert not parsed.traces
    assert any(chunk["label"] for chunk in parsed.chunks)


def test_special_tokens_are_in_the_vocabulary_from_the_start(tokenizer: DocumentTokenizer, tokenizer_file: Path):
    names = knot_tokens(CHUNKS)
    assert len(names) == 2 * CHUNKS + 3 == len(set(names))
    assert [tokenizer.tokenizer.token_to_id(name) for name in names] == list(range(1, len(names) + 1))
    existing = DocumentTokenizer(with_knot_tokens(tokenizer_file.read_bytes(), CHUNKS), "<|endoftext|>")
    assert [existing.tokenizer.token_to_id(name) for name in names] == list(range(300, 300 + len(names)))
    assert existing.vocab_size == 300 + len(names)
    assert with_knot_tokens(tokenizer_file.read_bytes(), 0) == tokenizer_file.read_bytes()
    for one in (tokenizer, existing):
        ids = one.tokenizer.encode("".join(names)).ids
        assert not set(ids) & {one.tokenizer.token_to_id(name) for name in names}, "text that names one is text"
        assert one.tokenizer.decode(ids) == "".join(names)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"chunk_odds": ()}, r"knots\.chunk_odds = \[\]: must hold a number"),
        ({"chunk_odds": (0.0, 0.0)}, r"knots\.chunk_odds = \[0\.0, 0\.0\]: must hold a number above 0"),
    ],
)
def test_bad_settings_are_named(settings_: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        KnotsConfig(**settings_)


def test_a_tokenizer_without_the_tokens_is_refused(tokenizer_file: Path):
    source = SourceConfig(kind="json", path="x")
    for chunks, good in ((0, False), (2, False), (3, True)):
        data = DataConfig(directory="x", source=source, tokenizer=TokenizerConfig(knot_chunks=chunks))
        if good:
            KnotsConfig(share=0.5).check(data)
        else:
            with pytest.raises(
                ValueError, match=rf"data\.tokenizer\.knot_chunks = {chunks}: knots\.chunk_odds needs 3; set"
            ):
                KnotsConfig(share=0.5).check(data)
    plain = DocumentTokenizer(tokenizer_file.read_bytes(), "<|endoftext|>")
    with pytest.raises(ValueError, match=r"the tokenizer lacks <\|label\|>.*set data\.tokenizer\.knot_chunks = 3"):
        Knots(KnotsConfig(share=0.5), plain, 0)
    with pytest.raises(ValueError, match="knot_chunks = 1: must be 0 or at least 2"):
        TokenizerConfig(knot_chunks=1)
    with pytest.raises(ValueError, match=r"vocab_size = 262: .* set it to at least 264"):
        TokenizerConfig(vocab_size=262, knot_chunks=2)
