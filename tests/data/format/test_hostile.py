"""Prepared data made by somebody who means harm: it is refused in one line, writes nothing else and runs no code."""

import functools
import hashlib
import io
import json
import pickle
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from longring.data import files as files_module
from longring.data.config import DataConfig, LoaderConfig, SourceConfig, TokenizerConfig
from longring.data.files import sha256_of, sha256_of_json
from longring.data.format import names, shards
from longring.data.format.damage import DamagedDataError
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.format.reader import SequenceReader
from longring.data.format.shards import BucketWriter, ShardName, load_shard_table, save_shard_table
from longring.data.format.store import CachedStore, LocalStore
from longring.data.prepare.prepare import prepare
from rich.console import Console

QUIET = Console(quiet=True)

NAMES = [
    "",
    ".",
    "..",
    "/tmp/longring-was-here",
    "../outside",
    "../../outside",
    "shards/../../outside",
    "shards/000000/../../../outside",
    "tokenizer.json/../../outside",
    "tokenizer.json\n",
    "tokenizer.json\0",
    "TOKENIZER.JSON",
    "shards/000000/train-L0000032-000000.tar\n",
    "shards/\u0660\u0660\u0660\u0660\u0660\u0660/train-L0000032-000000.tar",
    "shards\\000000\\train-L0000032-000000.tar",
    "x" * 100_000,
    ".ssh/authorized_keys",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path, words: Callable[..., str]) -> DataConfig:
    """Return the settings of prepared data that no test changes."""
    folder = tmp_path_factory.mktemp("hostile")
    lines = [json.dumps({"text": words(90 + number, number)}) + "\n" for number in range(12)]
    (folder / "documents.jsonl").write_text("".join(lines))
    config = DataConfig(
        directory=str(folder / "data"),
        source=SourceConfig(kind="json", path=str(folder / "documents.jsonl")),
        tokenizer=TokenizerConfig(path=str(tokenizer_file)),
        min_bucket_tokens=8,
        max_bucket_tokens=32,
        shard_tokens=2048,
    )
    prepare(config, QUIET, workers=1)
    return config


@pytest.fixture(scope="module")
def whole(config: DataConfig) -> Path:
    """Prepared data that no test changes."""
    return Path(config.directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def forge(data: dict[str, bytes], change: Callable[[dict[str, Any]], object]) -> dict[str, bytes]:
    """Return the files of `data` with a changed manifest whose own hash is right."""
    manifest = json.loads(data["manifest.json"])
    del manifest["sha256"]
    change(manifest)
    return {**data, "manifest.json": json.dumps({**manifest, "sha256": sha256_of_json(manifest)}).encode()}


def forge_file(data: dict[str, bytes], name: str, content: bytes) -> dict[str, bytes]:
    """Return the files of `data` with other content of a file beside the manifest, whose hash there is right."""
    digest = hashlib.sha256(content).hexdigest()
    return {**forge(data, lambda manifest: manifest["files"].update({name: digest})), name: content}


def serve(data: dict[str, bytes]) -> str:
    """Return the address of the files in fsspec's memory store."""
    address = f"memory://{uuid.uuid4().hex}"
    for name, content in data.items():
        fsspec.filesystem("memory").pipe(f"{address}/{name}", content)
    return address


def write(data: dict[str, bytes], directory: Path) -> Path:
    for name, content in data.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def use(directory: str | Path, cache: Path) -> None:
    """Do all that training, evaluation and inspection read."""
    manifest = open_prepared(directory, LoaderConfig(cache_directory=str(cache)))
    manifest.tokenizer()
    manifest.unigram()
    manifest.inputs()
    for bucket in manifest.buckets("train"):
        reader = manifest.reader(bucket)
        reader.read(range(reader.sequences))
        reader.document_starts(range(reader.sequences))
        if reader.sequences:
            manifest.origin(*reader.pieces([0])[0][0, :2].tolist())
    list(manifest.verify())


def assert_refused(directory: str | Path, tmp_path: Path, kind: type[Exception] = ValueError) -> str:
    """Use hostile data; return the one line that refuses it. Nothing is written but in the cache.

    `kind` decides the status: 74 for OSError, else 2.
    """
    (tmp_path / "cache").mkdir(exist_ok=True)
    before = {path for path in tmp_path.rglob("*") if tmp_path / "cache" not in path.parents}
    with pytest.raises(kind) as error:
        use(directory, tmp_path / "cache")
    said = str(error.value)
    assert len(said) < 1_500 and said.isprintable(), said
    assert ": " in said and ("; " in said or "do not use" in said), said
    assert {path for path in tmp_path.rglob("*") if tmp_path / "cache" not in path.parents} == before
    assert not Path("/tmp/longring-was-here").exists()
    return said


def test_honest_data_is_read(whole: Path, tmp_path: Path):
    use(serve(contents(whole)), tmp_path / "cache")
    use(whole, tmp_path / "cache")


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:40]))
def test_a_name_in_the_manifest_leads_nowhere_else(whole: Path, tmp_path: Path, name: str):
    """The server has content for every name that it gives."""
    data = contents(whole)
    address = serve(data)
    forged = forge(data, lambda manifest: manifest["files"].update({name: hashlib.sha256(b"harm").hexdigest()}))
    files = fsspec.filesystem("memory")
    files.pipe(f"{address}/manifest.json", forged["manifest.json"])
    for there in (f"{address}/{name}", f"{address}{name}", name):
        if name.strip("./"):
            with suppress(FileExistsError):  # the memory store has no file below a file
                files.pipe(there, b"harm")
    assert "damaged (it names a file" in assert_refused(address, tmp_path)
    local = write(forged, tmp_path / "local")
    assert "damaged (it names a file" in assert_refused(local, tmp_path)


@pytest.mark.parametrize("sha256", ["", "../../outside", "/" * 64, "g" * 64, "A" * 64, "0" * 63, None, 5, ["0" * 64]])
def test_a_hash_in_the_manifest_leads_nowhere_else(whole: Path, tmp_path: Path, sha256: Any):
    forged = forge(contents(whole), lambda manifest: manifest["files"].update({"order.json": sha256}))
    assert "manifest.json: damaged (files = " in assert_refused(serve(forged), tmp_path)


@pytest.mark.parametrize(("name", "sha256"), [("../outside", None), ("tokenizer.json", "../../outside")])
def test_a_name_or_a_hash_becomes_a_path_only_as_prepared_data_has_it(
    whole: Path, tmp_path: Path, name: str, sha256: str | None
):
    with pytest.raises(ValueError, match="do not use this data, or copy it again from where it was prepared"):
        names.path_of(tmp_path, name, sha256)
    for file, digest in json.loads(contents(whole)["manifest.json"])["files"].items():
        assert names.path_of(tmp_path, file, digest).parent == tmp_path


def test_a_link_out_of_a_local_directory_is_not_followed(whole: Path, tmp_path: Path):
    outside = write(contents(whole), tmp_path / "outside")
    (tmp_path / "link").symlink_to(outside)
    use(tmp_path / "link", tmp_path / "cache")  # the whole directory may be a link
    for name in ("tokenizer.json", "shards", "shards/000000"):
        data = write(contents(whole), tmp_path / name.replace("/", "-"))
        (data / name).rename(tmp_path / "aside")
        (data / name).symlink_to(outside / name)
        advice = "replace it by the file itself, or make the whole directory a link"
        assert f"is a link out of {data}; {advice}" in assert_refused(data, tmp_path)
        (data / name).unlink()
        (tmp_path / "aside").rename(data / name)
        use(data, tmp_path / "cache")


def field(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.update({name: value})


def test_every_field_of_a_manifest_has_its_type_and_bounds(whole: Path, tmp_path: Path):
    data = contents(whole)
    hostile = (
        None,
        True,
        -1,
        2**70,
        1.5,
        float("nan"),
        "x",
        "|O",
        [],
        [[]],
        [-8],
        [2**62],
        [8, 8],
        {},
        {"a": -1},
        "9" * 10**6,
    )
    allowed = {
        "has_boundaries": {"True"},
        "boundary": {"'x'", "'|O'", repr("9" * 10**6)},
        "order": {"None"},
        "extends": {"None", "'x'", "'|O'"},
    }
    folder = write(data, tmp_path / "data")
    for name in json.loads(data["manifest.json"]):
        if name in ("sha256", "config"):
            continue
        for value in hostile:
            if repr(value) not in allowed.get(name, ()):
                write({"manifest.json": forge(data, field(name, value))["manifest.json"]}, folder)
                said = assert_refused(folder, tmp_path)
                assert "manifest.json: " in said, (name, value, said)


@pytest.mark.parametrize("key", ["records", "splits", "bad"])
def test_a_ledger_of_any_content(whole: Path, tmp_path: Path, key: str):
    for value in (None, -5, "x", [], {}, {"train": {}}):
        forged = forge(
            contents(whole), lambda manifest, value=value: manifest["ledgers"]["documents"].update({key: value})
        )
        assert "manifest.json: damaged" in assert_refused(serve(forged), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 1_000_000,
        b'{"format_version": 3, "config": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b'{"format_version": ' + b"9" * 100_000 + b"}",
        b'{"format_version": 1e999}',
        b"\xff\xfe",
        b"null",
        b"2",
    ],
    ids=["lists", "tables", "digits", "infinity", "bytes", "null", "number"],
)
def test_a_manifest_of_any_shape(whole: Path, tmp_path: Path, content: bytes):
    data = {**contents(whole), "manifest.json": content}
    assert "manifest.json: " in assert_refused(serve(data), tmp_path)
    assert "manifest.json: " in assert_refused(write(data, tmp_path / "local"), tmp_path)


def test_a_manifest_of_gigabytes_is_not_read(whole: Path, tmp_path: Path):
    data = write(contents(whole), tmp_path / "local")
    with (data / "manifest.json").open("r+b") as file:
        file.truncate(1 << 33)  # a hole, which takes no space
    assert f"{1 << 33} bytes, and it has at most {1 << 26}" in assert_refused(data, tmp_path)


class Endless(io.RawIOBase):
    """A file of a server that never stops sending; reading more than `limit` bytes fails the test."""

    def __init__(self, limit: int):
        self.left = limit

    def read(self, size: int = -1) -> bytes:
        assert 0 < size <= self.left, "reads on beyond the size that the file may have"
        self.left -= size
        return b" " * size


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "train"])
def test_a_file_without_an_end_does_not_fill_the_disk(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(names, "MAX_BYTES", dict.fromkeys(names.MAX_BYTES, 200_000))
    monkeypatch.setattr("longring.data.format.store.MAX_BYTES", names.MAX_BYTES)
    monkeypatch.setattr("longring.data.format.content.MAX_BYTES", names.MAX_BYTES)
    address, opened = serve(contents(whole)), type(fsspec.filesystem("memory")).open

    def endless(self, path: str, *arguments: Any, **options: Any):
        most = 200_000 if name != "train" else max(file.stat().st_size for file in whole.rglob("*.tar"))
        return Endless(most + 1) if name in path else opened(self, path, *arguments, **options)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "open", endless)
    assert "bytes that it may have; copy the file there again" in assert_refused(address, tmp_path)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and name in file.name]


def test_a_shard_larger_than_the_cache_is_not_begun(whole: Path, tmp_path: Path):
    manifest = open_prepared(serve(contents(whole)), LoaderConfig(cache_directory=str(tmp_path), cache_bytes=1_000))
    bucket = manifest.buckets("train")[-1]
    with pytest.raises(ValueError, match=r"loader\.cache_bytes = 1000: .* has \d+ bytes by its manifest; raise it"):
        manifest.reader(bucket).read([0])


class Harm:
    """An object that makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def npy(descr: Any, shape: Any, content: bytes = b"", fortran: bool = False) -> bytes:
    header = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize("name", ["shards.npy", "unigram.npy"])
def test_npy_files_of_any_content(whole: Path, tmp_path: Path, name: str):
    data = contents(whole)
    harm = tmp_path / "cache" / "harm"
    stream = io.BytesIO()
    np.save(stream, np.array([Harm(harm)], dtype=object), allow_pickle=True)
    descr = "<i8" if name == "unigram.npy" else shards._STORED_DTYPE.descr
    hostile = [
        stream.getvalue(),
        pickle.dumps(Harm(harm)),
        b"",
        data[name][:20],
        data[name][:-1],
        data[name] + b"x",
        npy(descr, (10**15,)),
        npy(descr, (2**62, 2**62)),
        npy(descr, (-1,)),
        npy(descr, ()),
        npy(descr, (0,), b"x"),
        npy("|O", (1,), b"x" * 8),
        npy("|S0", (2**60,)),
        npy([("a", "<i8", (2**30, 2**30))], (1,)),
        npy("<f8", (1,), b"x" * 8),
        b"\x93NUMPY\x01\x00" + (9_000).to_bytes(2, "little") + b"(" * 9_000,
        b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"(" * 90,
        b"\x93NUMPY\x09\x09",
    ]
    for number, content in enumerate(hostile):
        said = assert_refused(write(forge_file(data, name, content), tmp_path / str(number)), tmp_path)
        assert name in said, said
    assert not harm.exists()


def table_of(directory: Path) -> np.ndarray:
    manifest = Manifest.load(LocalStore(directory))
    return load_shard_table(directory / "shards.npy", manifest.lengths, sum(manifest.sources.values())).copy()


def test_every_field_of_the_table_of_shards_has_its_bounds(whole: Path, tmp_path: Path):
    data = contents(whole)
    huge = [-(2**63), -1, 2**40, 2**62, 2**63 - 1]
    hostile: dict[str, list[Any]] = {
        "input_shard": [1, 2**32 - 1],
        "length": [0, 7, 64, *huge],
        "sequences": [0, *huge],
        "size_bytes": [0, *huge],
        "index_offset": huge,
        "samples": [0, *huge],
        "sha256": [b"", b"../../outside", b"\xff" * 64, b"G" * 64],
    }
    for name, values in hostile.items():
        for number, value in enumerate(values):
            table = table_of(whole)
            table[name][-1] = value
            file = tmp_path / "table.npy"
            save_shard_table(file, table)
            forged = write(forge_file(data, "shards.npy", file.read_bytes()), tmp_path / f"{name}-{number}")
            said = assert_refused(forged, tmp_path)
            assert "shard" in said, (name, value, said)


def test_data_that_was_made_wrongly_is_deleted_and_made_again(config: DataConfig, whole: Path, tmp_path: Path):
    """The index of a shard does not fit it, and the hash of the shard is the manifest's."""
    table, directory = table_of(whole), tmp_path / "data"
    name, begin = shards.shard_name(table[-1]).path(), int(table["index_offset"][-1])
    content = bytearray((whole / name).read_bytes())
    content[begin : begin + 8] = b"\xff" * 8
    table["sha256"][-1] = hashlib.sha256(content).hexdigest().encode()
    save_shard_table(tmp_path / "table.npy", table)
    forged = forge_file(contents(whole), "shards.npy", (tmp_path / "table.npy").read_bytes())
    said = assert_refused(write({**forged, name: bytes(content)}, directory), tmp_path, DamagedDataError)
    assert "so the data was made wrongly; do not use it, or delete its directory and run `longring prepare" in said
    shutil.rmtree(directory)
    prepare(replace(config, directory=str(directory)), QUIET, workers=1)
    use(directory, tmp_path / "cache")


def one_shard(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Write a shard of three samples; return its file and the table that names it."""
    folder = tmp_path / "data" / "shards" / "000000"
    folder.mkdir(parents=True)
    with BucketWriter(folder, ShardName(0, "train", 8, 0), np.dtype("<u2"), 64) as writer:
        for number in range(7):
            writer.append(np.arange(9, dtype="<u2"), [(number, 0, 0), (number, 3, 4)])
    [file] = folder.iterdir()
    return file, writer.shards()


def read_all(file: Path, table: np.ndarray) -> None:
    table["sha256"] = sha256_of(file).encode()
    reader = SequenceReader(LocalStore(file.parents[2]), 8, table, np.dtype("<u2"), 100)
    reader.read(range(7))
    reader.pieces(range(7))


@pytest.mark.parametrize("name", ["rows", "tokens_offset", "rows_offset", "documents_offset"])
def test_the_index_of_a_shard_has_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(shards, "SAMPLE_TOKENS", 3 * 8)
    file, table = one_shard(tmp_path)
    whole, begin = file.read_bytes(), int(table["index_offset"][0])
    end = begin + int(table["samples"][0]) * shards.INDEX_DTYPE.itemsize
    read_all(file, table)
    for sample in (0, -1):
        for value in (-(2**63), -64, -1, 0, 1, 2, 4, 2**20, 2**40, 2**62, 2**63 - 64, 2**63 - 1):
            index = np.frombuffer(whole[begin:end], shards.INDEX_DTYPE).copy()
            if name != "rows" and value in (0, 2, 4):
                value = int(index[name][sample]) + value or 8  # shifted by a token or two
            if int(index[name][sample]) == value:
                continue
            index[name][sample] = value
            file.write_bytes(whole[:begin] + index.tobytes() + whole[end:])
            with pytest.raises(
                DamagedDataError, match=r"\.tar: .*(index|table of pieces|ends too early).*; (run|do not)"
            ):
                read_all(file, table)


def test_the_pieces_of_a_shard_have_their_bounds(tmp_path: Path):
    file, table = one_shard(tmp_path)
    whole, begin = file.read_bytes(), int(table["index_offset"][0])
    [sample] = np.frombuffer(whole[begin : begin + shards.INDEX_DTYPE.itemsize], shards.INDEX_DTYPE)
    for offset, values in (
        (int(sample["rows_offset"]), (1, 2**31, 2**32 - 1)),
        (int(sample["rows_offset"]) + 4, (0, 1_000, 2**32 - 1)),
        (int(sample["documents_offset"]) + 8, (1, 2**32 - 1)),
        (int(sample["documents_offset"]) + 20, (0, 8, 2**32 - 1)),
    ):
        for value in values:
            file.write_bytes(whole[:offset] + value.to_bytes(4, "little") + whole[offset + 4 :])
            with pytest.raises(DamagedDataError, match=r"sequence \d of bucket 8: its table of pieces does not fit it"):
                read_all(file, table)


@pytest.mark.parametrize(
    "line",
    [b"{}", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"source": 5, "files": 7}', b""],
    ids=["table", "list", "null", "deep", "bytes", "types", "none"],
)
def test_lines_of_input_shards_of_any_content(whole: Path, tmp_path: Path, line: bytes):
    forged = forge_file(contents(whole), "inputs.jsonl", line + b"\n" * bool(line))
    said = assert_refused(serve(forged), tmp_path)
    assert "/inputs." in said
    assert "input shard" in said


def test_a_repair_reads_no_file_that_the_recipe_does_not_name(whole: Path, tmp_path: Path):
    """The manifest of finished data lists the files of its input shards, and a repair reads them again."""
    data = contents(whole)
    secret = tmp_path / "secret.jsonl"
    secret.write_text(json.dumps({"text": "a secret"}) + "\n")
    entry = json.loads(data["inputs.jsonl"])
    for files in ([str(secret)], ["http://127.0.0.1:9/x.jsonl"], [*entry["files"], str(secret)]):
        forged = forge_file(data, "inputs.jsonl", json.dumps({**entry, "files": files}).encode() + b"\n")
        directory = write(forged, tmp_path / str(uuid.uuid4()))
        min(directory.rglob("train*.tar")).unlink()
        settings = json.loads(data["manifest.json"])["config"]
        source, tokenizer = SourceConfig(**settings["source"]), TokenizerConfig(**settings["tokenizer"])
        config = DataConfig(**{**settings, "directory": str(directory), "source": source, "tokenizer": tokenizer})
        with pytest.raises(ValueError, match="is not among them.*bring the sources back, or delete"):
            prepare(config, QUIET, workers=1)


@contextmanager
def http(answer: Callable[[BaseHTTPRequestHandler], object]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_GET  # noqa: N815  the name that the server calls

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/data"
        finally:
            server.shutdown()
            thread.join()


def send(handler: BaseHTTPRequestHandler, content: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(content)


def test_an_http_server_that_names_files_outside_the_cache(whole: Path, tmp_path: Path):
    for name in ("/tmp/longring-was-here", "../../../outside", f"{tmp_path}/outside"):
        forged = forge(
            contents(whole),
            lambda manifest, name=name: manifest["files"].update({name: hashlib.sha256(b"").hexdigest()}),
        )

        def answer(handler: BaseHTTPRequestHandler, forged: dict[str, bytes] = forged) -> None:
            send(handler, forged.get(handler.path.removeprefix("/data/"), b""))

        with http(answer) as address:
            assert "damaged (it names a file" in assert_refused(address, tmp_path)


@pytest.mark.parametrize("fault", ["error", "unauthorized", "cut", "redirect"])
def test_an_http_server_that_answers_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    monkeypatch.setattr(files_module.time, "sleep", lambda _: None)
    answers: dict[str, Callable[[BaseHTTPRequestHandler], object]] = {
        "error": functools.partial(send, content=b"", status=500),
        "unauthorized": functools.partial(send, content=b"", status=401),
        "cut": functools.partial(send, content=b"{}", Content_Length="1000"),
        "redirect": lambda handler: send(handler, b"", 302, Location=handler.path),
    }
    with http(answers[fault]) as address:
        for _ in range(2):
            assert "cannot be read after 4 attempts" in assert_refused(address, tmp_path, OSError)


def test_names_of_honest_data_are_allowed(whole: Path, tmp_path: Path):
    for name in contents(whole):
        assert names.path_of(tmp_path, name) == tmp_path / name
    for name in ("order.json", "placement.npy", ShardName(2**32 - 1, "held_out", 2**40, 2**32 - 1).path()):
        assert names.path_of(tmp_path, name) == tmp_path / name


def test_a_store_asks_for_no_other_name(tmp_path: Path):
    store = CachedStore(serve({}), tmp_path / "cache", 1 << 30)
    for name in NAMES:
        with pytest.raises(ValueError, match="prepared data has none of this name"):
            store.path(name)
