"""Token ids as documents: streams divided at EOS, by one process or several, and marks removed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.data.config import SourceConfig
from longring.data.format.document import BadRecord
from longring.data.format.tokenizer import TokenMarks
from longring.data.prepare.kinds import token_streams
from longring.data.prepare.kinds.token_streams import stream_rows
from longring.data.prepare.token_documents import documents_of, ids_of

B, BOS, EOS = 0, 1, 2
MARKS = TokenMarks(end=EOS, names={B: "<|endoftext|>", BOS: "<s>", EOS: "</s>"}, dtype=np.dtype("<u2"))


def documents(rows: list[Any], holds: Any, **settings: Any) -> list[Any]:
    """Return the ids of each document, or the kind of a bad record."""
    named = ((f"row {number}", row if isinstance(row, BadRecord) else np.array(row)) for number, row in enumerate(rows))
    found = [ids for _, ids in documents_of(named, holds, MARKS, **settings)]
    return [ids.kind if isinstance(ids, BadRecord) else ids.tolist() for ids in found]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([5, 6], [5, 6]),
        ([BOS, 5, 6, EOS], [5, 6]),
        ([B, 5, 6, B], [5, 6]),
        ([EOS, BOS, 5, EOS, EOS], [5]),
        ([], "empty"),
        ([BOS, EOS], "empty"),
        ([5, EOS, 6], "bad_tokens"),
        ([5, B, 6], "bad_tokens"),
        ([5, BOS, 6], "bad_tokens"),
    ],
)
def test_marks_around_a_document_are_removed_and_refused_inside(row: list[int], expected: Any):
    assert documents([row], "document") == [expected]


def test_a_mark_inside_names_the_way_out():
    [(_, bad)] = documents_of(iter([("a:1", np.array([BOS, 5, EOS, 6]))]), "document", MARKS)
    assert isinstance(bad, BadRecord)
    assert bad.detail == (
        "'</s>' (2) is at 2 of 4 ids; if a record holds several documents, set data.source.record_holds to "
        "'documents' or 'stream'"
    )
    assert documents([[BOS, 5, EOS, 6]], "documents") == documents([[BOS, 5, EOS, 6]], "stream") == [[5], [6]]


def test_whole_documents_end_with_their_row_and_those_of_a_stream_do_not():
    rows = [[EOS, 5, 6, EOS, 7], [8, EOS, EOS, BOS], [9], BadRecord("wrong_type", ""), [5]]
    assert documents(rows, "documents") == [[5, 6], [7], [8], "empty", "empty", [9], "wrong_type", [5]]
    assert documents(rows, "stream") == [[5, 6], [7, 8], "empty", [9], "wrong_type", [5]]
    assert documents(rows[:1], "stream", from_start=False) == ["empty", [5, 6], [7]]


@pytest.mark.parametrize(
    "value",
    [None, 7, "ids", [1, 2.5], ["a"], [[1], [2]], [[1], [2, 3]], [2**70], [True], np.array([1.5]), np.array(["a"])],
    ids=str,
)
def test_a_value_that_is_no_list_of_ids(value: Any):
    found = ids_of(value, "ids")
    assert isinstance(found, BadRecord)
    assert found.kind == "wrong_type"


@given(
    stream=st.lists(st.integers(1, 4), max_size=60),
    parts=st.integers(1, 6),
    block=st.integers(1, 7),
    start=st.booleans(),
)
def test_parts_of_a_stream_hold_each_document_once(
    stream: list[int], parts: int, block: int, start: bool, tmp_path_factory: pytest.TempPathFactory
):
    """A document belongs to the part in which it begins, whatever the division and the size of a block."""
    file = tmp_path_factory.getbasetemp() / "stream.bin"
    ids = [*[EOS] * start, *stream, EOS]
    file.write_bytes(np.array(ids, dtype="<u2").tobytes())
    source = SourceConfig(kind="tokens", path=str(file))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_streams, "READ_TOKENS", block)
        for part in range(parts):
            rows = stream_rows(str(file), source, MARKS, part, parts)
            found += documents([ids for _, ids in rows], "stream", from_start=False)
    assert found == documents([ids], "stream")
