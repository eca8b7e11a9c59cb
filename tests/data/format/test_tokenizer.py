"""Streams of a tokenizer: any text between two boundaries, and token ids that are checked."""

import json

import numpy as np
import pytest
from longring.data.config import TokenizerConfig
from longring.data.format.document import BadRecord, Document
from longring.data.format.tokenizer import THREAD_CHARACTERS, DocumentTokenizer
from longring.data.format.tokenizer_file import TokenizerError
from longring.data.prepare.train_tokenizer import train_tokenizer
from tokenizers import Tokenizer, processors

END = "<|endoftext|>"
TEXTS = ["the ring turns, the ring returns", "Grüße, 世界 \U0001f44b\n\ttabs", "x = 1  # two spaces\r\n"]


def document(number: int, name: str, content: str | np.ndarray) -> Document:
    return Document(number, name, content, bytes(16))


def reject(name: str, bad: BadRecord) -> None:
    raise AssertionError(f"{name}: {bad}")


def no_cut(name: str, byte: int) -> None:
    raise AssertionError(f"{name}: a cut in a word before byte {byte}")


def load(content: bytes, boundary: str = END) -> DocumentTokenizer:
    return DocumentTokenizer(content, boundary)


def stream(tokenizer: DocumentTokenizer, text: str) -> list[int]:
    return next(tokenizer.streams([document(0, "name", text)], reject, no_cut))[1].tolist()


class Undecodable:
    """Tokenizer that fails on every token."""

    def decode(self, *_: object, **__: object) -> str:
        raise TokenizerError("index out of bounds")


def test_ids_that_cannot_be_decoded(content: bytes):
    tokenizer = load(content)
    ids = stream(tokenizer, "the ring")
    tokenizer.tokenizer = Undecodable()  # type: ignore[assignment]
    advice = r"prepare the data anew with another data\.tokenizer\.path"
    with pytest.raises(ValueError, match=rf"tokenizer\.json: cannot decode \(index out of bounds\); {advice}"):
        tokenizer.decode(ids)
    another = load(train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300)))
    assert another.decode(stream(another, "the ring")) == f"{END}the ring{END}"


@pytest.fixture(scope="module")
def content() -> bytes:
    return train_tokenizer(TEXTS * 3, TokenizerConfig(vocab_size=280))


@pytest.mark.parametrize("text", [*TEXTS, "\x00\x7f", "never seen: Ж", "  leading", "\ufffd", END, f"a{END}b"])
def test_any_text_comes_back_between_two_boundaries(content: bytes, text: str):
    tokenizer = load(content)
    first, *inner, last = stream(tokenizer, text)
    assert first == last == tokenizer.boundary_id
    assert tokenizer.boundary_id not in inner
    assert tokenizer.tokenizer.decode(inner, skip_special_tokens=False) == text


def test_empty_text_is_two_boundaries(content: bytes):
    assert stream(load(content), "") == [0, 0]


def test_many_batches_keep_order_and_equal_one_by_one(content: bytes):
    tokenizer = load(content)
    long = "ring " * (THREAD_CHARACTERS // 10)
    documents = [document(number, str(number), text) for number, text in enumerate(["a", long, long, "b", long, "c"])]
    found = list(tokenizer.streams(documents, reject, no_cut))
    assert [one.number for one, _ in found] == list(range(6))
    for one, tokens in found:
        whole = tokenizer.tokenizer.encode(str(one.content), add_special_tokens=False).ids
        assert tokens.tolist() == [0, *whole, 0]


def test_a_tokenizer_file_that_truncates_and_pads_is_not_obeyed(content: bytes):
    settings = json.loads(content)
    settings["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": END,
    }  # fmt: skip
    assert stream(load(json.dumps(settings).encode()), TEXTS[0]) == stream(load(content), TEXTS[0])


def test_not_a_tokenizer():
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer\.json .*; name another"):
        load(b"{}")


def test_unknown_boundary_names_the_alternatives(content: bytes):
    with pytest.raises(ValueError, match=r"data\.tokenizer\.boundary = '</s>': .*'<\|endoftext\|>'"):
        load(content, "</s>")
    load(content, END)


def test_a_boundary_that_text_encodes_to_is_refused(content: bytes):
    with pytest.raises(ValueError, match=r"data\.tokenizer\.boundary = 'x': text in name encodes to it"):
        stream(load(content, "x"), "x")


def test_large_vocabulary_takes_four_bytes(content: bytes):
    settings = json.loads(content)
    settings["added_tokens"].append({**settings["added_tokens"][0], "id": 65_536, "content": "<far>"})
    settings["model"]["vocab"]["<far>"] = 65_536
    assert load(json.dumps(settings).encode()).vocab_size == 65_537
    assert load(json.dumps(settings).encode()).dtype == np.uint32


def test_given_token_ids_are_checked_and_enclosed(content: bytes):
    tokenizer = load(content)
    given = [[5, 6], [5, 280], [5, -1], [7]]
    rejected: dict[str, BadRecord] = {}
    documents = [document(number, str(number), np.array(ids)) for number, ids in enumerate(given)]
    found = list(tokenizer.streams(documents, rejected.__setitem__, no_cut))
    assert {one.number: tokens.tolist() for one, tokens in found} == {0: [0, 5, 6, 0], 3: [0, 7, 0]}
    assert {name: bad.kind for name, bad in rejected.items()} == {"1": "bad_tokens", "2": "bad_tokens"}
    assert "[5, 280], vocabulary 280" in rejected["1"].detail


def test_marks_are_the_boundary_the_named_ones_and_those_of_the_template(content: bytes):
    library = Tokenizer.from_str(content.decode())
    library.add_special_tokens(["<s>", "</s>"])
    bos, eos = library.token_to_id("<s>"), library.token_to_id("</s>")
    plain = load(library.to_str().encode())
    assert plain.marks("", "")[:2] == (0, {0: END})
    assert plain.marks("<s>", "</s>")[:2] == (eos, {0: END, bos: "<s>", eos: "</s>"})
    template = {"single": "<s> $A </s>", "special_tokens": [("<s>", bos), ("</s>", eos)]}
    library.post_processor = processors.TemplateProcessing(**template)
    adds = load(library.to_str().encode())
    assert adds.marks("", "")[:2] == (0, {0: END, bos: "<s>", eos: "</s>"})
    # Text is tokenized without the template: LongRing's own boundary is all that is around it.
    assert stream(adds, "the ring") == stream(plain, "the ring")
    for key, names in (("bos", ("<x>", "")), ("eos", ("", "<x>"))):
        with pytest.raises(
            ValueError, match=rf"data\.source\.{key} = '<x>': not in the .*; name a special token \(.*'</s>'"
        ):
            adds.marks(*names)
