"""A manifest whose hash is right and whose fields are not is refused in one line, by every command that reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.sandbox import Sandbox
from helpers.small_checkpoint import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from longring.data.files import sha256_of, sha256_of_json
from longring.launch import cli
from longring.launch.checkpoint import format as checkpoint_format
from longring.launch.checkpoint.format import read_checkpoint_manifest
from longring.launch.preflight import preflight
from longring.launch.settings import to_tree

FILE = "rank-00001.safetensors"
HUGE = 10**400
STATE: dict[str, list[Any]] = {
    "run": [None, 7, "", "1" * 31, "\x1b[2J" + "1" * 28, "G" * 32, ["1" * 32]],
    "recipe": [None, [1], "model", 3],
    "data": [None, "d" * 63, "D" * 64, "\n" * 64],
    "code": [None, 1, "c" * 65],
    "packages": [None, [], {"torch": 2}, {"torch": "2\x1b[2J"}, {"torch\x1b[2J": "2"}],
    "order": ["2", 0, -1, 2.0, True, None, HUGE],
    "step": ["5", 5.0, True, None, -3, 0, 4, 6, HUGE],
    "world_size": ["2", 0, -1, 2.5, HUGE],
    "tensor": [0, -1, 10**12, "1", None],
    "zero_stage": [-1, 4, "1", None],
    "skipped": [None, ["x"], [3, 3], [4, 3], [0], [6], [1.0], [True], {"3": 1}, [HUGE]],
    "recent_losses": [None, ["x"], [None], [float("nan")], [float("inf")], [HUGE], [[1.0]]],
    "more": [1],
}
PARAMETER: dict[str, list[Any]] = {
    "shape": [None, [], [0], [-8], ["8"], [8.0], [1 << 30, 1 << 30], [HUGE], [1] * 9, 8],
    "cut": [[9, 0], [0, 0], [2, 1], [-1, 1], [0], [0, 1, 1], [0, 3], [1, 2], ["0", 1], 0, "01", {}, False],
}
ENTRY: dict[str, list[Any]] = {
    "bytes": [None, -1, "8", 1.5, HUGE],
    "sha256": [None, 7, "../x", "e" * 63],
    "slice": [None, -1, 1, "0", 10**12],
    "ranges": [
        *(None, [], {"w": None}, {"w": [0]}, {"w": [0, 4, 4]}, {"w": [-4, 4]}, {"w": [4, -4]}, {"w": [4, 5]}),
        *({"w": ["4", 4]}, {"w": [4.0, 4]}, {"w": [HUGE, 0]}, {"v": [0, 0]}, {"\x1b": [0, 0]}),
    ],
}


def forge(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a manifest, whose hash is right again."""
    file = checkpoint / "manifest.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    change(content)
    file.write_text(json.dumps({**content, "sha256": sha256_of_json(content)}))


def changes() -> dict[str, Callable[[dict[str, Any]], object]]:
    """Return a change of a manifest for every wrong value and every field that is left out, by name."""
    found: dict[str, Callable[[dict[str, Any]], object]] = {}
    for path, fields in ((("state",), STATE), (("parameters", "w"), PARAMETER), (("files", FILE), ENTRY)):

        def table(content: dict[str, Any], path: tuple[str, ...] = path) -> dict[str, Any]:
            for name in path:
                content = content[name]
            return content

        for name, values in fields.items():
            for value in values:
                change = lambda content, table=table, name=name, value=value: table(content).update({name: value})  # noqa: E731
                found[f"{path[-1]}.{name}={value!r:.40}"] = change
            if name not in ("more", "order"):  # checkpoints were written before orders had versions
                found[f"{path[-1]} without {name}"] = lambda content, table=table, name=name: table(content).pop(name)
    for name in ("state", "parameters", "files"):
        for value in (None, [], 7, {"x": 1}):
            found[f"{name}={value!r}"] = lambda content, name=name, value=value: content.update({name: value})
        found[f"without {name}"] = lambda content, name=name: content.pop(name)
    found["more"] = lambda content: content.update(more=1)
    return found


CHANGES = changes()
STARTED = ("state.step='5'", "state.tensor=1000000000000", "w.cut=[9, 0]", "state.skipped=['x']", f"{FILE}.slice=1")
"""Changes that are tried by whole commands as well."""


def said(checkpoint: Path) -> str:
    """Return the error with which the manifest of a checkpoint is refused, for the second time as for the first."""
    found = set()
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(str(checkpoint))) as error:
            read_checkpoint_manifest(checkpoint)
        found.add(str(error.value))
    [text] = found
    return text


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_of_a_manifest_has_its_type_and_bounds(tmp_path: Path, name: str):
    path = make_checkpoint(tmp_path, 5)
    assert read_checkpoint_manifest(path).state.step == 5
    forge(path, CHANGES[name])
    text = said(path)
    advice = f"; remove {path} to resume from the checkpoint before, or name another run_directory"
    assert text.startswith(f"{path}/manifest.json: not as LongRing writes it: ")
    assert text.endswith(advice)
    assert text.isprintable()
    assert len(text) < 600


@pytest.mark.parametrize("name", STARTED)
def test_every_command_refuses_a_forged_manifest_in_one_line(name, recipe_file, tmp_path, capsys):
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    sandbox.begin()
    state = {"data": sha256_of(sandbox.data / "manifest.json"), "recipe": to_tree(sandbox.load())}
    for step in (4, 5):
        make_checkpoint(sandbox.run.checkpoints, step, **state)
    path = sandbox.run.checkpoints / "step-00000005"
    forge(path, CHANGES[name])
    text = said(path)
    for _ in range(2):
        with pytest.raises(ValueError, match="not as LongRing writes it"):
            preflight(sandbox.load(), 4)
        assert sandbox.train() == text
        assert sandbox.main("checkpoints", str(sandbox.run.path), "--verify") == text
    path.rename(tmp_path / "removed")
    assert preflight(sandbox.load(), 4).steps_done == 4, "the advice works"
    capsys.readouterr()
    assert cli.main(["checkpoints", str(sandbox.run.path), "--verify"]) == 0


def test_a_manifest_of_gigabytes_is_not_read(tmp_path, monkeypatch):
    path = make_checkpoint(tmp_path, 5)
    file = path / "manifest.json"
    whole = file.read_bytes()
    with file.open("ab") as stream:
        stream.truncate((1 << 30) + 1)
    assert said(path).startswith(f"{file}: has 1,073,741,825 bytes, and a manifest has at most 1,073,741,824; remove ")
    monkeypatch.setattr(checkpoint_format, "MAX_BYTES", len(whole))
    file.write_bytes(whole)
    assert read_checkpoint_manifest(path).state.step == 5


@pytest.mark.parametrize("claimed", [None, 7, "\x1b[2J", ["a"]])
def test_a_hash_that_is_none_is_damage(tmp_path, claimed):
    path = make_checkpoint(tmp_path, 5)
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**content, "sha256": claimed}))
    assert said(path) == f"{path}/manifest.json: damaged: it has no SHA-256 of its content"


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@given(data=st.data())
def test_a_manifest_of_any_values(tmp_path_factory, data):
    """Any one value is replaced: the manifest is read, or refused with an explanation."""
    path = make_checkpoint(tmp_path_factory.mktemp("any"), 5)

    def change(content: dict[str, Any]) -> None:
        while True:
            key = data.draw(st.sampled_from(sorted(content)))
            if not isinstance(content[key], dict) or not content[key] or data.draw(st.booleans()):
                break
            content = content[key]
        content[key] = data.draw(trees)

    forge(path, change)
    try:
        refused = None
        assert read_checkpoint_manifest(path).state.updates >= 0
    except ValueError as error:
        refused = str(error)
    assert refused is None or ("; " in refused and refused.isprintable())
