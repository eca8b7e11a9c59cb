"""A checkpoint read by one process, as another program reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.small_checkpoint import STATE, make_checkpoint
from longring.launch.checkpoint.files import Checkpoint
from longring.launch.errors import DamageError


def test_the_last_good_checkpoint_of_a_run_is_read_whole(tmp_path: Path):
    for step in (5, 6):
        last = make_checkpoint(tmp_path / "checkpoints", step)
    (last / "rank-00001.safetensors").write_bytes(b"")  # not as long as the manifest says
    found = Checkpoint(tmp_path)
    assert found.path == tmp_path / "checkpoints" / "step-00000005"
    assert (found.step, found.shapes, found.recipe) == (5, {"w": (8,)}, STATE.recipe)
    assert torch.equal(found.read("w"), torch.tensor([0.0] * 4 + [1.0] * 4))
    found.verify()
    with pytest.raises(KeyError):
        found.read("no such parameter")
    named = Checkpoint(str(last))
    assert named.step == 6
    with pytest.raises(DamageError, match="0 bytes"):
        named.verify()


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no checkpoint yet; train first"):
        Checkpoint(tmp_path)
