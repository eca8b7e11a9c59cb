"""A corpus that every machine with LongRing has: the Python files of the installed packages.

Packages are held out whole, so that no held-out document has a neighbour of its own package in the training documents.
Near-duplicates, which packages have of each other's files, are left out by `longring order` before the packages are
divided.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from longring.data.files import write_text
from longring.data.format.manifest import open_prepared
from longring.data.order.finish import PLACEMENT_FILE

from . import ROOT
from .commands import longring
from .script import Row

RECIPE = ROOT / "benchmarks" / "corpus.toml"
SPLITS = ("train", "held_out")


class CorpusSize(NamedTuple):
    """How much of the installed packages a corpus has."""

    max_characters: int
    """Limit on the characters of the packages that are taken; 0: none."""
    held_out_share: float
    """Largest share of the characters that held-out packages have."""
    vocab_size: int
    """Tokens of the vocabulary with which near-duplicates are searched."""


CORPUS_SIZES: Mapping[str, CorpusSize] = {
    "full": CorpusSize(0, 0.08, 4096),
    "quick": CorpusSize(8_000_000, 0.08, 4096),
    "smallest": CorpusSize(2_000_000, 0.5, 512),
}
ACCOUNT = "corpus.json"
"""File with the account of a corpus, written last."""


class File(NamedTuple):
    """A Python file of a package."""

    package: str
    """Name below site-packages: the first directory of the path, or the module."""
    path: str
    """Path below site-packages, with slashes."""
    text: str


def site_packages() -> Path:
    """Return the directory of the installed packages: the one that has numpy."""
    return Path(np.__file__).parents[1]


def hashed(name: str) -> bytes:
    """Return the hash of a name: an order of names that is the same on every machine, and no other order."""
    return blake2b(name.encode(), digest_size=16).digest()


def files_of(site: Path, max_characters: int, left_out: Counter[str]) -> Iterator[File]:
    """Yield the Python files of packages in the order of their paths' hashes; count what is left out by reason.

    With `max_characters` above 0 there are only packages that fit, in the order of their hashes.
    """
    paths = defaultdict(list)
    for path in site.rglob("*.py"):
        below = path.relative_to(site)
        # An editable install has a module with the paths of its machine.
        if path.is_file() and "__pycache__" not in below.parts and not below.name.startswith("__editable__"):
            paths[below.parts[0].removesuffix(".py")].append(path)
    chosen, room = [], max_characters or None
    for package in sorted(paths, key=hashed):
        size = sum(path.stat().st_size for path in paths[package])
        if room is None or size <= room:
            chosen.append(package)
            room = None if room is None else room - size
    package_of = {path.relative_to(site).as_posix(): package for package in chosen for path in paths[package]}
    for name in sorted(package_of, key=hashed):
        try:
            text = (site / name).read_bytes().decode()
        except UnicodeDecodeError:
            left_out["not UTF-8"] += 1
            continue
        if text.strip():
            yield File(package_of[name], name, text)
        else:
            left_out["empty"] += 1


def held_out_packages(characters: Mapping[str, int], share: float) -> set[str]:
    """Return packages with at most this share of all characters, taken in the order of their hashes.

    A package with more than a quarter of the share is not taken, so that there are several.
    """
    room = share * sum(characters.values())
    most, found = room / 4, set()
    for package in sorted(characters, key=hashed):
        if characters[package] <= min(most, room):
            found.add(package)
            room -= characters[package]
    return found


def near_duplicates(folder: Path, vocab_size: int) -> tuple[set[int], int]:
    """Return the lines of `files.jsonl` in a directory that have a near-duplicate before them, and all tokens."""
    (folder / RECIPE.name).write_bytes(RECIPE.read_bytes())
    settings = [f"data.tokenizer.vocab_size={vocab_size}"]
    longring(folder, "prepare", RECIPE.name, *settings)
    longring(folder, "order", RECIPE.name, *settings, "--workers", "1")
    placement = np.load(folder / "ordered" / PLACEMENT_FILE)
    dropped = placement["record"][placement["length"] == 0]
    return set(dropped.tolist()), open_prepared(folder / "prepared").ledger.tokens


def make_corpus(folder: Path, size: CorpusSize, site: Path) -> Row:
    """Write `train.jsonl` and `held_out.jsonl` into a directory, unless they are there, and return their account.

    A line is {"package", "path", "text"}. Every file is counted once: it is left out for a reason or in one split. The
    corpus is a function of the installed files alone. Raises AssertionError if the counts do not add up.
    """
    if (folder / ACCOUNT).exists():
        return json.loads((folder / ACCOUNT).read_text())
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    left_out: Counter[str] = Counter()
    files = list(files_of(site, size.max_characters, left_out))
    write_text(work / "files.jsonl", "".join(json.dumps(one._asdict()) + "\n" for one in files))
    found = len(files) + left_out.total()
    dropped, tokens = near_duplicates(work, size.vocab_size)
    left_out["near-duplicate"] = len(dropped)
    kept = [one for number, one in enumerate(files) if number not in dropped]
    characters: Counter[str] = Counter()
    for one in kept:
        characters[one.package] += len(one.text)
    held_out = held_out_packages(characters, size.held_out_share)
    rows = []
    for split in SPLITS:
        mine = [one for one in kept if (one.package in held_out) == (split == "held_out")]
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(one._asdict()) + "\n" for one in mine))
        rows.append(
            {
                "split": split,
                "packages": len({one.package for one in mine}),
                "files": len(mine),
                "characters": sum(len(one.text) for one in mine),
            }
        )
    assert found == left_out.total() + sum(row["files"] for row in rows), "every file is counted once"
    account = {
        "files": found,
        "left_out": dict(left_out),
        "tokens": tokens,
        "vocab_size": size.vocab_size,
        "rows": rows,
        "held_out_packages": sorted(held_out),
        "distributions": distributions(site),
    }
    shutil.rmtree(work)
    write_text(folder / ACCOUNT, json.dumps(account, indent=1) + "\n")
    return account


def distributions(site: Path) -> dict[str, str]:
    """Return the versions of the distributions in a directory of packages."""
    found = metadata.distributions(path=[str(site)])
    return dict(sorted((one.metadata["Name"], one.version) for one in found))
