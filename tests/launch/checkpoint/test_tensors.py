"""Ranges of tensors are read as the safetensors library reads them; a disk that fails is an error, never a signal."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from longring.data import files
from longring.launch.checkpoint import tensors as tensors_module
from longring.launch.checkpoint.tensors import DTYPES, TensorFile, write_one_by_one, write_safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(files.time, "sleep", found.append)
    return found


@given(data=st.data())
def test_ranges_are_those_of_the_library(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("ranges") / "x.safetensors"
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    dtypes = sorted(data.draw(st.lists(st.sampled_from(list(DTYPES)), min_size=4, max_size=4)), key="F32".__ne__)
    tensors = {f"{n}/weight": torch.randn(size).to(DTYPES[dtypes[n]]) for n, size in enumerate(sizes)}
    if data.draw(st.booleans()):
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        described = {name: (dtypes[n], tuple(tensor.shape)) for n, (name, tensor) in enumerate(tensors.items())}
        write_one_by_one(file, described, tensors.values(), metadata=data.draw(st.sampled_from([None, {"a": "b"}])))
        loaded = load_file(file)
        assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())
    ours = TensorFile(file)
    with safe_open(file, framework="pt") as theirs:
        for name, tensor in tensors.items():
            first = data.draw(st.integers(0, len(tensor) - 1))
            result = torch.empty(data.draw(st.integers(1, len(tensor) - first)))
            ours.read_into(result, name, first)
            assert result.equal(theirs.get_slice(name)[first : first + len(result)].float())
            with pytest.raises(ValueError, match=f"fewer elements of {name}"):
                ours.read_into(torch.empty(len(tensor) - first + 1), name, first)
    with pytest.raises(ValueError, match="fewer elements of none"):
        ours.read_into(torch.empty(1), "none", 0)
    ours.close()


def test_a_tensor_of_no_type_for_weights_is_not_read(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.arange(4), "x": torch.ones(1)}, file)
    opened, one = TensorFile(file), torch.empty(1)
    with pytest.raises(ValueError, match="w is I64, and weights are F32, BF16, F16"):
        opened.read_into(one, "w", 0)
    opened.read_into(one, "x", 0)
    assert one == 1


def test_a_disk_that_fails_is_tried_again_and_then_an_error(tmp_path, monkeypatch, pauses):
    """The file is hashed and opened already; a mapped file would end the process by SIGBUS."""
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"w": torch.arange(8.0)})
    opened = TensorFile(file)
    reads, left = os.preadv, [3]

    def failing(*arguments: Any) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return reads(*arguments)

    monkeypatch.setattr(tensors_module.os, "preadv", failing)
    result = torch.empty(4)
    opened.read_into(result, "w", 2)
    assert result.tolist() == [2, 3, 4, 5]
    assert pauses == [1, 2, 4]
    for _ in range(2):
        left[0] = 99
        with pytest.raises(OSError, match=rf"{file}: cannot be read after 4 attempts \(\[Errno 5"):
            opened.read_into(result, "w", 2)
    left[0] = 0
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(OSError, match="it ends early"):
        opened.read_into(result, "w", 4)


def with_header(file: Path, header: bytes, length: int | None = None) -> Path:
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(16))
    return file


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "entry",
    [
        *(None, [], 7, {}, {**GOOD, "dtype": "F16"}, {**GOOD, "dtype": None}, {**GOOD, "shape": 4}),
        *({**GOOD, "shape": [8]}, {**GOOD, "shape": [-4]}, {**GOOD, "shape": ["4"]}, {**GOOD, "shape": [10**400]}),
        *({**GOOD, "data_offsets": offsets} for offsets in ([0], [0, 17], [16, 0], [-16, 0], [4, 20], ["0", 16], 7)),
    ],
    ids=repr,
)
def test_an_entry_that_does_not_fit_the_file_is_refused(tmp_path, entry):
    file = tmp_path / "x.safetensors"
    assert TensorFile(with_header(file, json.dumps({"w": GOOD}).encode()))
    with pytest.raises(ValueError, match="'w' = "):
        TensorFile(with_header(file, json.dumps({"w": entry}).encode()))


@pytest.mark.parametrize("header", [b"", b"words", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"w": 1'], ids=repr)
def test_a_header_that_is_none_is_refused(tmp_path, header):
    with pytest.raises(ValueError, match="it has|its header|codec|JSON|Expecting|Extra"):
        TensorFile(with_header(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("length", [1 << 20, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_not_read(tmp_path, length):
    with pytest.raises(ValueError, match="its header has"):
        TensorFile(with_header(tmp_path / "x.safetensors", b"{}", length))
    (tmp_path / "x.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="it has 5 bytes"):
        TensorFile(tmp_path / "x.safetensors")
