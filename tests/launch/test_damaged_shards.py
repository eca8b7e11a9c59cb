"""A run that reads a damaged shard ends with one line, at each start, until the command that it names has mended it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from helpers.faulty import start
from longring.data.files import sha256_of
from longring.data.format.damage import DamagedDataError
from longring.launch import cli
from longring.launch.errors import GO_ON_LATER, IO_ERROR, USER_ERROR
from longring.launch.ranks.rank import as_rank
from longring.launch.trainer import read


@pytest.mark.full
@pytest.mark.parametrize("damage", ["another token", "no token"])
def test_a_damaged_shard_ends_the_run_and_its_advice_mends_it(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
):
    data = Path(shutil.copytree(recipe_file.parent / "data", tmp_path / "data"))
    shards = sorted(data.rglob("train*.tar"))
    hashes = {shard: sha256_of(shard) for shard in shards}
    for shard in shards:
        content = bytearray(shard.read_bytes())
        # The first token behind the headers of tar and npy: another one of the vocabulary, or one outside it.
        first = content.index(b".tokens.npy") // 512 * 512 + 512 + 128
        content[first] ^= 1
        if damage == "no token":
            content[first : first + 2] = b"\xff\xff"
        shard.write_bytes(content)
    settings = [f"data.directory={data}", f"run_directory={tmp_path}/run", "parallel.tokens_per_rank=512"]
    output = tmp_path / "output.txt"
    for _ in range(2):
        output.unlink(missing_ok=True)
        statuses = start(2, recipe_file, settings, output).wait()
        assert USER_ERROR in statuses
        assert set(statuses) <= {USER_ERROR, GO_ON_LATER}
        said = " ".join(output.read_text().split())
        assert "error: rank " in said
        assert "in the manifest, and s" in said, said  # a step that reads it, or a sequence
        assert "; run `longring prepare RECIPE --verify`, which makes it again" in said
        assert "Traceback" not in said
    assert cli.main(["prepare", str(recipe_file), f"data.directory={data}", "--verify"]) == 0
    assert "missing or damaged shards are made again" in " ".join(capsys.readouterr().out.split())
    assert {shard: sha256_of(shard) for shard in shards} == hashes
    assert start(2, recipe_file, settings, output).wait() == [0, 0]


@pytest.mark.parametrize(
    ("error", "status"),
    [(DamagedDataError("x.tar: SHA-256 is wrong"), USER_ERROR), (OSError(errno.EIO, os.strerror(errno.EIO)), IO_ERROR)],
)
def test_any_rank_says_alone_what_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int
):
    def batches():
        raise error
        yield

    torchrun = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert as_rank(lambda: int(bool(read(batches(), 7, 3)))) == status
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: rank 3")
    assert "step 7: " in said
    assert ("x.tar" in said) == (status == USER_ERROR)
