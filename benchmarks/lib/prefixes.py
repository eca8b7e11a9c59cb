"""Documents behind related documents and behind others, whose losses say what related ones are worth."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .corpus import hashed

BEGINNING = 128
"""Tokens of a document that may be the same in all files of its package: a licence and imports."""
UNEQUAL = 0.05
"""Largest difference between the lengths of two prefixes, as a share of their tokens, among which one is drawn."""


class Text(NamedTuple):
    """A held-out document."""

    package: str
    folder: str
    """Directory of the file, within its package."""
    path: str
    tokens: list[int]


class Prefixed(NamedTuple):
    """A document behind others."""

    target: int
    """Number of the document among those that are scored."""
    kind: str
    """Relation of the documents before it: "none", "related" or "other"."""
    before: list[Text]


def texts(file: Path, tokenizer: Tokenizer, most_tokens: int) -> list[Text]:
    """Return the held-out documents of 64 to `most_tokens` tokens, in an order that does not follow their names."""
    found = []
    with file.open() as lines:
        for line in lines:
            entry = json.loads(line)
            ids = tokenizer.encode(entry["text"], add_special_tokens=False).ids
            if 64 <= len(ids) <= most_tokens:
                path = Path(entry["path"])
                found.append(Text(entry["package"], str(path.parent), entry["path"], ids))
    return sorted(found, key=lambda text: hashed(text.path))


def nearest_in_length(texts: Sequence[Text], among: Sequence[Text]) -> tuple[list[Text], float]:
    """Return a text of `among` for each text, as nearly as long; and how much their lengths differ, as a share."""
    left, found = list(among), []
    for text in texts:
        found.append(min(left, key=lambda one: abs(len(one.tokens) - len(text.tokens))))
        left.remove(found[-1])
    unequal = sum(abs(len(one.tokens) - len(text.tokens)) for one, text in zip(found, texts, strict=True))
    return found, unequal / sum(len(text.tokens) for text in texts)


def prefixes(all_texts: Sequence[Text], counts: Sequence[int], limit: int) -> tuple[list[Text], list[Prefixed]]:
    """Return at most `limit` documents to score, and each behind none, behind K related ones and behind K others.

    K is each of `counts`. Related documents are of the same package, of the same directory first. The others are of one
    other package, each nearly as long as the related one in its position: of the packages that have such documents, one
    is drawn by a hash. A document that is scored has at least 2 * BEGINNING tokens.
    """
    most = max(counts)
    of_package: dict[str, list[Text]] = defaultdict(list)
    for text in all_texts:
        of_package[text.package].append(text)
    of_package = {package: mine for package, mine in of_package.items() if len(mine) > most}
    # Packages in turns, so that no large one has most of the targets.
    turns = sorted(
        (number, hashed(package), text)
        for package, mine in of_package.items()
        for number, text in enumerate(text for text in mine if len(text.tokens) >= 2 * BEGINNING)
    )
    targets, found = [text for _, _, text in turns[:limit]], []
    for number, target in enumerate(targets):
        mine = [text for text in of_package[target.package] if text is not target]
        related = sorted(mine, key=lambda text: text.folder != target.folder)[:most]
        foreign = [
            (*nearest_in_length(related, theirs), hashed(target.path + package))
            for package, theirs in of_package.items()
            if package != target.package
        ]
        others, _, _ = min(foreign, key=lambda one: (max(one[1], UNEQUAL), one[2]))
        found.append(Prefixed(number, "none", []))
        # The nearest of the related documents stands last, next to the target.
        found += [Prefixed(number, "related", related[:count][::-1]) for count in counts]
        found += [Prefixed(number, "other", others[:count][::-1]) for count in counts]
    return targets, found


def rows_of(
    targets: Sequence[Text], found: Sequence[Prefixed], boundary: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Return tokens, starts and parts as in `score_rows.py`: a row of `length` inputs ends with its document.

    Part 1 is the beginning of the document, part 2 is what comes after it, its boundary included. What stands before
    the prefix is not seen.
    """
    tokens = np.full((len(found), length + 1), boundary)  # [rows, length + 1]
    starts, parts = np.zeros(len(found), np.int64), np.zeros((len(found), length), np.uint8)
    for number, one in enumerate(found):
        target = targets[one.target].tokens
        stream = [boundary]
        for text in one.before:
            stream += [*text.tokens, boundary]
        stream += [*target, boundary]
        tokens[number, -len(stream) :] = stream
        starts[number] = length + 1 - len(stream)
        first = length - len(target) - 1
        parts[number, first : first + BEGINNING] = 1
        parts[number, first + BEGINNING :] = 2
    return tokens, starts, parts


def standard_error(values: NDArray[np.float64], groups: NDArray[np.str_]) -> float:
    """Return the standard error of the mean of values that are independent between groups, but not within one."""
    centred = values - values.mean()
    sums = np.array([centred[groups == group].sum() for group in np.unique(groups)])
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))
