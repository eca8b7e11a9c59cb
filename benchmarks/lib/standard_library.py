"""Texts for benchmarks of preparation: the files of the standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def corpus(limit_characters: int) -> list[str]:
    """Return the files of the standard library until they have `limit_characters` together."""
    texts, total = [], 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in file.parts and total < limit_characters:
            text = file.read_text(encoding="utf-8", errors="ignore")
            texts += [text] * bool(text)
            total += len(text)
    return texts
