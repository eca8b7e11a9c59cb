"""Key tokens of LongPPL as a judge has chosen them, for the models that it compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class KeyTokens:
    """Key tokens of held-out sequences."""

    judge: str
    """Name of the model that has chosen them."""
    by_length: Mapping[int, NDArray[np.bool_]]
    """Whether each target is one, `[sequences, length]`, by the length of the bucket."""

    def save(self, file: Path) -> None:
        """Write the key tokens to a file."""
        # Eight tokens a byte: [sequences, length / 8], rounded up.
        masks = {str(length): np.packbits(keys, axis=1) for length, keys in self.by_length.items()}
        with file.open("wb") as opened:
            np.savez(opened, allow_pickle=False, judge=np.array(self.judge), **masks)

    @classmethod
    def load(cls, file: Path) -> KeyTokens:
        """Return the key tokens in a file that `save` has written."""
        with np.load(file, allow_pickle=False) as found:
            lengths = [name for name in found.files if name != "judge"]
            return cls(
                str(found["judge"]),
                # `count` leaves out the bits that fill the last byte.
                {int(n): np.unpackbits(found[n], axis=1, count=int(n)).astype(bool) for n in lengths},
            )
