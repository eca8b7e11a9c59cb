"""The worth of context: the loss of the same tokens after prefixes of several lengths, and LongPPL."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.format.bucket import Bucket
from ...data.format.manifest import Manifest
from ...data.format.reader import SequenceReader
from .buckets import evenly
from .score import Row, Scorer

EIGHTHS = 8
"""Number of parts of a sequence: the last is scored, and 0, 1, ..., 7 parts before it are visible."""

LONG_SHORT_NATS = 2.0
"""LongPPL: a key token's loss with a short context is more than this above that with the whole one (alpha)."""
LONG_NATS = 2.0
"""LongPPL: a key token's loss with the whole context is below this (-beta)."""


@dataclass(frozen=True)
class HeldOutRows:
    """Held-out sequences of one bucket as rows."""

    manifest: Manifest
    reader: SequenceReader
    numbers: NDArray[np.int64]
    """Number of each row's sequence in the bucket, `[rows]`."""

    @classmethod
    def of(cls, manifest: Manifest, bucket: Bucket, count: int) -> HeldOutRows:
        """Return `count` rows that lie evenly over a bucket."""
        return cls(manifest, manifest.reader(bucket), evenly(bucket, count))

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, index: int, parts: NDArray[np.uint8], cuts: tuple[int, ...] = ()) -> Row:
        """Return a row in which tokens after a cut see nothing before it.

        Documents that the data keep apart see nothing of each other either.
        """
        number = self.numbers[index : index + 1]
        [tokens] = self.reader.read(number).astype(np.int64)  # [length + 1]
        starts = {0, *cuts}
        if self.manifest.has_boundaries:
            starts.update(*self.reader.document_starts(number))
        return Row(tokens, parts, tuple(sorted(starts)))


def gain_of_context(scorer: Scorer, rows: HeldOutRows) -> dict[str, Any]:
    """Return the loss of the last eighth of sequences, by the eighths before it that are visible. Collective.

    `losses` are means in nats per token; `gain` is the first loss less the last, with the standard error of its mean
    over the sequences.
    """
    length, num_sequences = scorer.layout.length, len(rows)
    begin = length - length // EIGHTHS
    parts = (np.arange(length) >= begin).astype(np.uint8)  # [length], 1 in the last eighth

    def row(number: int) -> Row:
        sequence, visible = divmod(number, EIGHTHS)
        cut = begin - visible * length // EIGHTHS
        return rows.row(sequence, parts, (cut,) if cut > 0 else ())

    # Of part 1: [sequences, visible eighths, (loss, right tokens, tokens)].
    sums = scorer.sums(num_sequences * EIGHTHS, 2, row)[:, 1].reshape(num_sequences, EIGHTHS, 3)
    losses = sums[..., 0] / sums[..., 2]  # [sequences, visible eighths]
    gains = losses[:, 0] - losses[:, -1]
    error = float(gains.std(ddof=1) / math.sqrt(num_sequences)) if num_sequences > 1 else None
    return {
        "length": length,
        "sequences": num_sequences,
        "losses": losses.mean(0).tolist(),
        "gain": float(gains.mean()),
        "gain_error": error,
    }


def key_tokens(
    scorer: Scorer, rows: HeldOutRows, short: int, stride: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Yield losses with the whole context `[length]`, and whether each token is a key token, by sequence. Collective.

    The model itself is the judge. A token's short context begins between `short - stride` and `short` tokens before it.
    A key token's loss with the short context is LONG_SHORT_NATS or more above that with the whole one, which is below
    LONG_NATS; none is among the first `short` tokens.
    """
    length = scorer.layout.length
    passes = short // stride
    none = np.zeros(length, dtype=np.uint8)
    # Pass j cuts at j * stride, j * stride + short, ...; of its tokens, the last `stride` before each cut are taken.
    # The last pass cuts nowhere.
    cuts = [tuple(range(number * stride, length, short)) for number in range(passes)] + [()]
    taken = (np.arange(length) // stride + 1) % passes  # [length], the pass from which a token is taken

    def row(number: int) -> Row:
        sequence, which = divmod(number, passes + 1)
        return rows.row(sequence, none, cuts[which])

    # The rows of one sequence follow each other, the one with the whole context last.
    losses = scorer.losses(len(rows) * (passes + 1), row)
    for _ in range(len(rows)):
        *by_pass, whole = (next(losses) for _ in range(passes + 1))
        brief = np.choose(taken, by_pass)  # [length], each token from its own pass
        key = (brief - whole > LONG_SHORT_NATS) & (whole < LONG_NATS)
        key[:short] = False
        yield whole, key


def judged(
    scorer: Scorer, rows: HeldOutRows, keys: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Yield the same as `key_tokens`, with key tokens `[sequences, length]` of another model. Collective."""
    none = np.zeros(scorer.layout.length, dtype=np.uint8)
    return zip(scorer.losses(len(keys), lambda number: rows.row(number, none)), keys, strict=True)


def long_ppl(
    length: int, short: int, judge: str | None, found: Iterable[tuple[NDArray[np.float64], NDArray[np.bool_]]]
) -> dict[str, Any]:
    """Return LongPPL (arXiv 2410.23771): the exponential of the mean loss of key tokens; None without any.

    `found` are losses and key tokens of sequences, `[length]` each, as `key_tokens` or `judged` yield them. Without a
    `judge` the model itself has chosen the key tokens.
    """
    key_loss, num_keys, sequences = 0.0, 0, 0
    for whole, key in found:
        key_loss, num_keys, sequences = key_loss + float(whole[key].sum()), num_keys + int(key.sum()), sequences + 1
    return {
        "length": length,
        "sequences": sequences,
        "short": short,
        "judge": judge,
        "key_tokens": num_keys,
        "tokens": sequences * (length - short),
        "long_ppl": math.exp(key_loss / num_keys) if num_keys else None,
    }
