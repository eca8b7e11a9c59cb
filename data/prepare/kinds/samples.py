"""Tar files of webdataset samples.

The standard library's tarfile reads them. webdataset reads with it too, but takes a damaged header for the end of the
file, and imports torch into every process.
"""

import io
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from numpy.typing import NDArray

from ...config import SourceConfig
from ...format.document import BadRecord
from .files import UnreadableError, decoded, opened
from .text import parsed
from .token_streams import npy_numbers


class _Member(tarfile.TarInfo):
    """Header of a member. The tar must end with its mark: tarfile itself takes a cut or damage there for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, and no mark of the end") from error


def tar_rows(file: str, source: SourceConfig) -> Iterator[tuple[str, Any]]:
    """Yield (name, record) of the samples of a tar file: adjacent members whose names are equal up to the first dot.

    The ending of a member names its field. Those of a `.json` member are fields of the record themselves, a `.txt`
    member is the field `text` too, and members of other kinds are not read.
    """
    with opened(file) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:
        for key, members in groupby(_members(tar), key=lambda found: found[0]):
            record: dict[str, Any] = {}
            bad = None
            for _name, ending, member in members:
                value = _value(tar, member, ending)
                bad = bad or (value if isinstance(value, BadRecord) else None)
                record |= value if isinstance(value, dict) else {ending: value}
            yield f"{file}:{key}", bad or record


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (sample, ending, member) of each file of a tar; names that begin with two underscores are no samples."""
    while member := tar.next():
        tar.members.clear()  # type: ignore[attr-defined]  # a stream never goes back to them
        folder, slash, name = member.name.rpartition("/")
        sample, _, ending = name.partition(".")
        if member.isfile() and not name.startswith("__"):
            yield folder + slash + sample, ending, member


def _value(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> Any:
    """Return the text, the ids or the fields of a member; None if it is of another kind."""
    kind = ending.rpartition(".")[2]
    if kind not in ("txt", "json", "npy"):
        return None
    content = tar.extractfile(member).read()  # type: ignore[union-attr]  # it is a file
    if kind == "npy":
        return _ids(content, ending)
    if kind == "json":
        return parsed(content)
    text = decoded(content)
    return text if isinstance(text, BadRecord) else {ending: text, "text": text}


def _ids(content: bytes, ending: str) -> NDArray | BadRecord:
    try:
        found = npy_numbers(io.BytesIO(content))
    except UnreadableError as error:
        return BadRecord("bad_tokens", f"member .{ending}: {error}")
    return found.read(0, found.count)
