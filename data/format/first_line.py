"""The first line of a document, by which a person recognizes it in a report or table."""

import numpy as np
from numpy.typing import NDArray

from .manifest import Manifest

FIRST_LINE_TOKENS = 32
"""Number of tokens, from the start of a document, in which its first line is sought."""


def first_line(manifest: Manifest, tokens: NDArray[np.unsignedinteger]) -> str:
    """Return the first line of `tokens` [n] that has letters or digits, or all of their text if none has."""
    text = manifest.tokenizer().decode([token for token in tokens.tolist() if token != manifest.boundary_id])
    return next((line.strip() for line in text.splitlines() if any(map(str.isalnum, line))), text.strip())
