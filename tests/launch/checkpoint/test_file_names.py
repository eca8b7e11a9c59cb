"""A name in the manifest of a checkpoint is that of a rank's file, and becomes no other path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.small_checkpoint import make_checkpoint
from longring.data.files import sha256_of_json
from longring.launch.checkpoint.format import find_damage, read_checkpoint_manifest

NAMES = [
    "",
    ".",
    "..",
    "manifest.json",
    "/etc/passwd",
    "../step-00000005/rank-00000.safetensors",
    "../../../outside",
    "a/rank-00000.safetensors",
    "rank-00000.safetensors/../../outside",
    "rank-00000.safetensors\n",
    "rank-00000.safetensors\0",
    "rank-0.safetensors",
    "rank-\u0660\u0660\u0660\u0660\u0660.safetensors",
    "rank-00000.pt",
    "rank-" + "9" * 100_000 + ".safetensors",
]


def forge(checkpoint: Path, name: str) -> None:
    """Give a file of the checkpoint another name in its manifest, whose hash is right."""
    file = checkpoint / "manifest.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    content["files"][name] = content["files"].pop("rank-00001.safetensors")
    file.write_text(json.dumps({**content, "sha256": sha256_of_json(content)}))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:40]))
def test_only_the_files_of_ranks_are_opened(tmp_path: Path, name: str):
    checkpoint = make_checkpoint(tmp_path, 5)
    manifest = read_checkpoint_manifest(checkpoint)
    assert find_damage(checkpoint, manifest) is None
    forge(checkpoint, name)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"it names a file .*, and ranks write rank-NNNNN") as error:
            read_checkpoint_manifest(checkpoint)
        assert len(str(error.value)) < 600
        assert str(error.value).isprintable()
