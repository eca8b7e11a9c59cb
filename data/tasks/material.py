"""Material of tasks: a tokenizer, and the text in which needles are hidden."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .draws import Draws
from .sample import Tokens
from .words import NOISE, sentence


class Documents(Protocol):
    """Held-out documents in tokens."""

    def text(self, num_tokens: int, draws: Draws) -> Tokens:
        """Return `num_tokens` tokens of documents, without boundary tokens."""
        ...

    def continued(self, length: int, draws: Draws) -> tuple[Tokens, Tokens, int]:
        """Return a row `[length + 1]`, another document's tokens `[length + 1]`, and a cut of both."""
        ...


class Material:
    """Tokenizer and haystacks of tasks. `documents` None: there is only generated text.

    Ids of adjacent texts are joined, so that the number of tokens of a row is the sum of its texts'. Each text is
    encoded after the text that comes before it, whose ids are then removed. Where the tokenizer merges across the cut,
    the text is encoded alone.
    """

    def __init__(self, tokenizer: Tokenizer, boundary_id: int, documents: Documents | None = None) -> None:
        self.boundary_id = boundary_id
        self.documents = documents
        self._tokenizer = tokenizer
        self._ends: NDArray[np.bool_] | None = None

    def encode(self, texts: Sequence[str], before: str = "\n") -> list[Tokens]:
        """Return the ids of each text where it follows `before`, without the ids of `before`."""
        head = self._encode([before])[0]
        found = self._encode([before + text for text in texts])
        merged = [index for index, ids in enumerate(found) if ids[: len(head)] != head]
        alone = dict(zip(merged, self._encode([texts[index] for index in merged]), strict=True))
        return [
            np.array(alone[index] if index in alone else ids[len(head) :], dtype=np.int64)
            for index, ids in enumerate(found)
        ]

    def one(self, text: str, before: str = "\n") -> Tokens:
        """Return the ids of one text where it follows `before`, without the ids of `before`."""
        return self.encode([text], before)[0]

    def mark(self, name: str, text: str) -> Tokens:
        """Return the id of the special token `name`, or the ids of `text` if the tokenizer has none of that name."""
        number = self._tokenizer.token_to_id(name)
        return self.one(text) if number is None else np.array([number], dtype=np.int64)

    def symbols(self, letters: str) -> Tokens:
        """Return a different token for each letter, one that stands for the letter, with a space before it if possible.

        Raises ValueError if the tokenizer has no such tokens.
        """
        for form in (" {}", "{}"):
            found = self.encode([form.format(letter) for letter in letters], before="a")
            if len({ids.item() for ids in found if len(ids) == 1}) == len(letters):
                return np.concatenate(found)
        raise ValueError(
            f"evaluate.tasks = automaton: the tokenizer has no token of its own for each of {letters!r}; leave out the "
            "automaton"
        )

    def random_tokens(self, count: int, draws: Draws) -> Tokens:
        """Return random tokens of the vocabulary, special ones left out."""
        special = self._tokenizer.get_added_tokens_decoder()
        # Sorted, as the library gives the vocabulary in another order each time.
        ids = sorted(set(self._tokenizer.get_vocab(with_added_tokens=False).values()) - {*special, self.boundary_id})
        return np.array(ids, dtype=np.int64)[draws.integers(len(ids), count)]

    def haystack(self, kind: str, num_tokens: int, draws: Draws) -> Tokens:
        """Return `num_tokens` tokens of text: "noise" is a paragraph repeated, "documents" are held out.

        Without documents, generated sentences stand in for them.
        """
        if kind == "documents" and self.documents is not None:
            return self.documents.text(num_tokens, draws)
        found: list[Tokens] = [np.empty(0, dtype=np.int64)]
        left = num_tokens
        # Every text has a token at least, so `left` falls.
        while left > 0:
            # More sentences at once than are likely to be needed: encoding in batches is what is fast.
            texts = [NOISE if kind == "noise" else sentence(draws) for _ in range(1 + left // 16)]
            found += self.encode([texts[0]]) * len(texts) if kind == "noise" else self.encode(texts)
            left = num_tokens - sum(map(len, found))
        tokens = np.concatenate(found)
        return tokens[len(tokens) - num_tokens :]  # the first sentence is cut, and the last one is whole

    def cuts(self, tokens: Tokens) -> Tokens:
        """Return the positions in `tokens` before which a sentence or a line begins, ascending; 0 and the end too."""
        if self._ends is None:
            size = self._tokenizer.get_vocab_size(with_added_tokens=True)
            # Ids may have gaps, and the highest is then above their number.
            size = max(size, 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values()))
            texts = self._tokenizer.decode_batch([[number] for number in range(size)], skip_special_tokens=False)
            self._ends = np.array([text.endswith(("\n", ".")) for text in texts], dtype=np.bool_)
        inside = np.flatnonzero(self._ends[tokens[:-1]]) + 1  # positions after an end
        return np.unique(np.concatenate([inside, [0, len(tokens)]]))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
