"""A run that reads a damaged shard ends with one line, at each start, until the command that it names has mended it."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.faulty import start
from longring.data import files
from longring.data.config import LoaderConfig
from longring.data.files import sha256_of
from longring.data.format.damage import DamagedDataError
from longring.data.format.manifest import open_prepared
from longring.data.read.batch_order import ReplicaShare
from longring.data.read.loader import Loader
from longring.launch import cli
from longring.launch.config import load_recipe
from longring.launch.errors import GO_ON_LATER, IO_ERROR, USER_ERROR
from longring.launch.preflight import preflight
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


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_refuses_its_shards_is_one_line_and_not_damage(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int
):
    """The store has given the manifest; then the credentials end, or it fails."""
    recipe, refused = load_recipe(recipe_file), [True]

    class Server(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if refused[0] and self.path.endswith(".tar"):
                self.send_error(status)
            else:
                super().do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    torchrun = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    config, order = LoaderConfig(cache_directory=str(tmp_path)), preflight(recipe, 1).order

    def train(address: str) -> int:
        manifest = open_prepared(address, config)
        loader = Loader(manifest, order, config, lambda length: ReplicaShare(0, 1, 2048 // length))
        return as_rank(lambda: read(loader.batches(0, 8), 1, 3).step - 1)

    handler = functools.partial(Server, directory=recipe.data.directory)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}"
            for _ in range(2):
                assert train(address) == IO_ERROR
                [line] = capsys.readouterr().err.splitlines()
                assert line.startswith(f"error: rank 3 cannot read its rows of step 1: {address}/shards/")
                assert f".tar: cannot be read after 4 attempts (ClientResponseError: {status}, " in line
                assert "; start again when its storage answers" in line
            refused[0] = False
            assert train(address) == 0
        finally:
            server.shutdown()
            thread.join()
