"""Files of sources as bytes: tar archives and npy arrays."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np


def tar(members: Sequence[tuple[str, bytes]]) -> bytes:
    """Return a tar archive of members by name, in order; names may come twice."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return content.getvalue()


def npy(array: Any) -> bytes:
    """Return an npy file."""
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()
