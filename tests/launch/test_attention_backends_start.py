"""The whole of a start's measurement of attention backends, with its processes: on the CPU, which stands for a GPU."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from longring.kernels.attention import attention
from longring.kernels.backends import BACKENDS
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask
from longring.launch import attention_backends
from longring.launch.attention_backends import FILE, with_backends
from longring.launch.config import load_recipe
from longring.parallel.mesh import join
from rich.console import Console

CPU = torch.device("cpu")
TEXT = "triton; forward causal: torch_cpu; backward causal: torch_cpu"


def starts(recipe_file: Path, folder: Path) -> tuple[list[str], str]:
    """Return what two starts of a run take, and what they print; the second finds no table in the cache.

    Everything is done as on a GPU, but for the device: processes check and time each backend, here on the CPU, where
    `torch_cpu` computes and `triton`, the default, cannot.
    """
    sizes = ("data.max_bucket_tokens=64", "parallel.tokens_per_rank=64", "train.global_batch_tokens=64")
    recipe = load_recipe(recipe_file, ["model.num_kv_heads=4", *sizes])
    mesh = join(recipe.parallel, 1)
    on_gpu = replace(mesh, device=torch.device("cuda"))
    BACKENDS["torch_cpu"] = BACKENDS["torch_cpu"]._replace(unfit=lambda case: None)
    attention_backends.architecture = lambda device: "sm_90"
    attention_backends.choose_backend = lambda case: "triton"
    for name in ("measured_apart", "machine_of", "rehearse", "tiles_of"):
        setattr(attention_backends, name, partial(on_cpu, getattr(attention_backends, name)))
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    console, file, taken = Console(width=80, file=io.StringIO()), folder / "run" / FILE, list[str]()
    os.environ.pop("TRITON_INTERPRET", None)  # as in a start: the processes inherit it
    start = partial(with_backends, recipe, on_gpu, [64], console, file)
    taken.append(start().train.attention_backend)
    (folder / "triton" / FILE).unlink()
    taken.append(start().train.attention_backend)
    assert json.loads(file.read_text())["backend"] == taken[0]
    q, k, v = torch.randn((3, 1, 64, 4, 16), generator=torch.Generator().manual_seed(0))
    mask = make_mask(SeqLayout.contiguous(64), SeqLayout.contiguous(64), device=CPU)
    assert torch.equal(attention(q, k, v, mask, backend=taken[0]), attention(q, k, v, mask, backend="torch_cpu"))
    return taken, console.file.getvalue()  # type: ignore[attr-defined]


def on_cpu(function, *arguments):
    """Call a function with the CPU for every device."""
    return function(*(CPU if isinstance(argument, torch.device) else argument for argument in arguments))


@pytest.mark.full
def test_a_start_measures_checks_keeps_and_recalls_its_backends(on_ranks, unread_recipe, tmp_path):
    [(taken, printed)] = on_ranks(1, starts, unread_recipe, tmp_path)
    assert taken == [TEXT, TEXT]
    lines = [line.split() for line in printed.splitlines()]
    for task in ("forward", "backward"):
        [row] = (line for line in lines if line[:3] == [task, "causal", "torch_cpu"])
        assert row[3] == "*" and float(row[4]) > 0
        [row] = (line for line in lines if line[:3] == [task, "causal", "triton"])
        assert row[3] == "ValueError:", "it could not compute, and says why"
    assert printed.splitlines()[-1].endswith(f"{TEXT} (as before: {tmp_path}/run/{FILE})")
