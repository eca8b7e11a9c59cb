"""Opening of a file that may be remote or compressed, and of one with text."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pyarrow

from ...format.document import BadRecord

UTF_8_MARK = b"\xef\xbb\xbf"
_UTF_16_MARKS = b"\xff\xfe", b"\xfe\xff"


class UnreadableError(Exception):
    """A file is cut, or not what its kind says."""


@contextmanager
def opened(file: str) -> Iterator[io.BufferedReader]:
    """Open a file that may be compressed; reading raises OSError or EOFError at the cut of a compressed stream."""
    zst = file.endswith(".zst")
    with fsspec.open(file, "rb", compression=None if zst else "infer") as stream:
        # Arrow's zst reader reads all frames and notices a cut; those of zstandard and fsspec do neither.
        yield io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd") if zst else stream)  # type: ignore[arg-type]


@contextmanager
def opened_text(file: str) -> Iterator[io.BufferedReader]:
    """Open a file of UTF-8 after its byte order mark, which editors and spreadsheets write and which is no text.

    Raises UnreadableError for UTF-16, which has a mark of its own.
    """
    with opened(file) as stream:
        first = stream.peek(len(UTF_8_MARK))
        if first.startswith(_UTF_16_MARKS):
            raise UnreadableError("it is UTF-16, and texts are read as UTF-8")
        if first.startswith(UTF_8_MARK):
            stream.read(len(UTF_8_MARK))
        yield stream


def decoded(content: bytes) -> str | BadRecord:
    """Return a text in UTF-8, or the position of the first byte that is none."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return BadRecord("invalid_utf8", f"byte {error.start}")
