"""The job of a preparation: its settings and its input shards, in `<directory>.partial/work`.

A later attempt must have the same settings and the same files. A process that prepares one input shard reads one line.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..files import write_text, write_whole
from ..format.manifest import INPUTS_FILE
from ..format.settings import differences, settings_of, with_defaults
from .sources import InputShard

JOB_FILE = "job.json"

OFFSETS_FILE = "offsets.bin"
"""File of the byte offset of each input shard's line in the job's inputs.jsonl, then the size of that file: int64
[input shards + 1]."""


LISTED = "work"
"""Folder of the list of the input shards."""


def begin_job(config: DataConfig, partial: Path, inputs: Sequence[InputShard]) -> None:
    """Write the settings of a preparation and the hash of its files. Raises ValueError if it was begun with others."""
    file = partial / "work" / JOB_FILE
    job = {"data": settings_of(config), "inputs": hashlib.sha256(b"".join(_lines(inputs))).hexdigest()}
    if not file.exists():
        write_text(file, json.dumps(job))
        return
    before = json.loads(file.read_text())
    delete = f"or delete {partial} and run `longring prepare RECIPE`"
    for key, then, now in differences("data", with_defaults(before["data"]), job["data"]):
        raise ValueError(
            f"{key} = {now!r}: {partial} is a preparation begun with {then!r}; set it back to continue, {delete}"
        )
    if before["inputs"] != job["inputs"]:
        raise ValueError(
            f"data.directory = {config.directory}: {partial} is a preparation begun with other files or file "
            f"sizes; bring the files back to continue, {delete}"
        )


def is_listed(partial: Path) -> bool:
    """Return whether the input shards are listed, and so may be prepared."""
    return (partial / LISTED / INPUTS_FILE).exists()


def list_inputs(partial: Path, inputs: Sequence[InputShard], folder: str = LISTED) -> None:
    """Write the lines of the input shards. In the folder LISTED it is the last step before they are prepared."""
    lines = _lines(inputs)
    offsets = np.cumsum([0, *map(len, lines)])  # [input shards + 1]
    # The offsets first: `is_listed` takes the presence of the lines for that of both.
    write_whole(partial / folder / OFFSETS_FILE, lambda path: path.write_bytes(offsets.astype("<i8").tobytes()))
    write_whole(partial / folder / INPUTS_FILE, lambda path: path.write_bytes(b"".join(lines)))


def listed_shard(partial: Path, number: int, folder: str = LISTED) -> InputShard:
    """Return input shard `number` of the job; the lines of the others, which may be many, are not read."""
    with (partial / folder / OFFSETS_FILE).open("rb") as offsets:
        offsets.seek(8 * number)  # int64: where this line begins, then the next
        first, last = np.frombuffer(offsets.read(16), dtype="<i8").tolist()
    with (partial / folder / INPUTS_FILE).open("rb") as lines:
        lines.seek(first)
        return InputShard.from_json(json.loads(lines.read(last - first)))


def _lines(inputs: Sequence[InputShard]) -> list[bytes]:
    return [json.dumps(asdict(shard)).encode() + b"\n" for shard in inputs]
