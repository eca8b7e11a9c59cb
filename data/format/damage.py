"""Damage of prepared data: shards that are not what the manifest says, and the command that makes them again."""

from pathlib import Path

from ..files import read_patiently, sha256_of


class DamagedDataError(ValueError):
    """A shard is not what its manifest says; one rank alone may notice."""


def wrong_size(file: Path, size_bytes: int, sha256: str, command: str) -> DamagedDataError | None:
    """Return the error of a shard that is missing or does not have `size_bytes` bytes; None if its size is right.

    The message advises to run `command`, which made the data and repairs it.
    """
    if not file.is_file():
        found = f"missing, {size_bytes} bytes in the manifest"
    elif (size := file.stat().st_size) != size_bytes:
        found = f"{size} bytes with SHA-256 {sha256_of(file)}, {size_bytes} bytes with SHA-256 {sha256} in the manifest"
    else:
        return None
    return DamagedDataError(f"{file}: {found}; run `{command} RECIPE`, which makes it again")


def wrong_hash(file: Path, found: str, sha256: str, command: str, where: str = "") -> DamagedDataError | None:
    """Return the error of a shard whose SHA-256 is `found`, or None if that is right.

    `where` follows the hashes in the message.
    """
    if found == sha256:
        return None
    return DamagedDataError(
        f"{file}: SHA-256 is {found}, {sha256} in the manifest{where}; run `{command} RECIPE --verify`, which makes it "
        "again"
    )


def wrong_content(file: Path, what: str, sha256: str, command: str) -> DamagedDataError:
    """Return the error of a shard whose content contradicts itself; `what` is the contradiction, for the message.

    The hash of the shard tells whether it is damaged or was made wrongly.
    """
    found = read_patiently(file, lambda: sha256_of(file))
    return wrong_hash(file, found, sha256, command, f", and {what}") or DamagedDataError(
        f"{file}: {what}, and its SHA-256 is the manifest's, so the data was made wrongly; do not use it, or delete "
        f"its directory and run `{command} RECIPE`"
    )
