"""The start of a model: equal weights on every mesh, and the settings of the libraries below it."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.lanes import by_lane
from helpers.ranks import variables_of
from helpers.small_checkpoint import STATE, read_whole
from longring.kernels.layout import SeqLayout
from longring.launch import build
from longring.launch.build import attention_on_one_rank, build_engine
from longring.launch.checkpoint.save import Saver
from longring.launch.config import load_recipe
from longring.launch.errors import USER_ERROR
from longring.launch.opening import opening
from longring.launch.preflight import preflight
from longring.launch.ranks import start
from longring.launch.ranks.rank import as_rank
from longring.launch.run_directory import RunDirectory
from longring.model import transformer, weights
from longring.parallel.config import ParallelConfig
from longring.parallel.device import private_directory
from longring.parallel.mesh import join, megatron_config
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.utils.checkpoint import checkpoint

MESHES = {
    "1 rank, ZeRO 0": (1, ["parallel.zero_stage=0"]),
    "1 rank, ZeRO 3": (1, ["parallel.zero_stage=3"]),
    "2 ranks, ZeRO 1": (2, ["parallel.zero_stage=1"]),
    "3 ranks, ZeRO 2": (3, ["parallel.zero_stage=2", "train.global_batch_tokens=1536"]),
    "4 ranks, tensor 2, ZeRO 3": (4, ["parallel.zero_stage=3", "parallel.tensor=2"]),
}


def save_first_weights(recipe_file: Path, overrides: list[str], target: Path) -> None:
    """Save the weights of a run before its first step."""
    recipe = load_recipe(recipe_file, overrides)
    mesh = join(recipe.parallel, 1)
    saver = Saver(build_engine(recipe, 500, mesh), RunDirectory(target), mesh, recipe.train, 1)
    saver.begin(replace(STATE, step=1, skipped=(), tensor=mesh.tensor_size, world_size=mesh.world_size))
    assert saver.finish()
    saver.close()


@pytest.mark.parametrize(
    ("dtype", "meshes"),
    by_lane([("bfloat16", (0, 3, 4)), ("float32", range(5))], quick=[], slow=[("float32", range(5))]),
)
def test_initial_weights_are_equal_on_every_mesh(on_ranks, recipe_file, tmp_path, dtype, meshes):
    first, *others = (list(MESHES)[number] for number in meshes)
    found = {}
    for name in (first, *others):
        world_size, overrides = MESHES[name]
        target = tmp_path / name
        on_ranks(world_size, save_first_weights, recipe_file, [*overrides, f"train.dtype={dtype}"], target)
        found[name] = read_whole(target / "checkpoints" / "step-00000001")
    for name in others:
        assert found[name].keys() == found[first].keys()
        assert all(np.array_equal(found[name][key], value) for key, value in found[first].items()), name
    matrices = [value for key, value in found[first].items() if key.endswith("weight/weight") and value.ndim > 1]
    assert len({value.tobytes()[:64] for value in matrices}) == len(matrices), "each has its own values"


def whole_while_another_is_drawn(recipe_file: Path, stage: int) -> int:
    """Return the largest number of elements in whole parameters of the model when a further parameter is drawn."""
    models, found = [], []
    fill, draw = build.fill_weights, weights._drawn

    def filling(model, *arguments):
        models.append(model)
        fill(model, *arguments)

    def drawing(*arguments):
        found.append(sum(p.numel() for p in models[0].parameters() if p.device.type != "meta"))
        return draw(*arguments)

    build.fill_weights, weights._drawn = filling, drawing
    recipe = load_recipe(recipe_file, [f"parallel.zero_stage={stage}", "train.dtype=bfloat16"])
    build_engine(recipe, 500, join(recipe.parallel, 1))
    return max(found)


@pytest.mark.full
def test_zero3_divides_a_parameter_before_the_next_is_drawn(on_ranks, recipe_file):
    assert on_ranks(2, whole_while_another_is_drawn, recipe_file, 3) == [0, 0]
    assert min(on_ranks(2, whole_while_another_is_drawn, recipe_file, 2)) > 0


def random_states_kept(recipe_file: Path) -> list[bool]:
    """Return, for each call of torch's checkpoint in a forward with recomputation, whether it keeps random states."""
    kept = []

    def watched(*arguments, preserve_rng_state=True, **named):
        kept.append(preserve_rng_state)
        return checkpoint(*arguments, preserve_rng_state=preserve_rng_state, **named)

    transformer.checkpoint = watched
    recipe = load_recipe(recipe_file, ["train.memory.activations=recompute_layer"])
    mesh = join(recipe.parallel, 1)
    engine = build_engine(recipe, 500, mesh)
    tokens, layout = torch.zeros(1, 65, dtype=torch.int64), SeqLayout.contiguous(64)
    attend = attention_on_one_rank("auto", mesh.device, [None])(layout)
    engine(tokens[:, :-1], tokens[:, 1:], layout, attend)
    return kept


@pytest.mark.full
def test_recomputation_keeps_no_random_state(on_ranks, recipe_file):
    assert on_ranks(1, random_states_kept, recipe_file) == [[False] * 4]


@pytest.mark.parametrize("cuda", [True, False])
def test_megatron_sums_in_a_fixed_order_on_a_gpu_if_asked(monkeypatch, cuda):
    """On a CPU torch's own embedding does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    parallel = ParallelConfig(tokens_per_rank=32)
    assert [megatron_config(parallel, exact).deterministic_mode for exact in (False, True)] == [False, cuda]


QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
READ = (QUEUES, "NCCL_NCHANNELS_PER_NET_PEER")


def environment_when_the_gpu_starts(recipe_file: Path, tensor: int, own: str | None) -> list[str]:
    """Return the variables of `READ` when a rank first uses its GPU, with the user's own value of all or None."""
    for name in READ:
        os.environ.pop(name, None)
        if own:
            os.environ[name] = own
    found = []

    def used(*_: object) -> None:
        found.extend(os.environ[name] for name in READ)
        raise KeyboardInterrupt

    torch.cuda.is_available, torch.cuda.set_device = lambda: True, used
    with pytest.raises(KeyboardInterrupt):
        join(load_recipe(recipe_file, [f"parallel.tensor={tensor}", "parallel.cp.max_ctas=4"]).parallel, 1)
    return found


@pytest.mark.parametrize(
    ("tensor", "own", "expected"),
    by_lane([(1, None, ["32", "4"]), (2, None, ["1", "4"]), (2, "8", ["8", "8"])], quick=[(1, None, ["32", "4"])]),
)
def test_cuda_and_nccl_are_told(on_ranks, recipe_file, tensor, own, expected):
    """One queue under tensor parallelism, and as many CTAs across nodes as inside one."""
    assert on_ranks(tensor, environment_when_the_gpu_starts, recipe_file, tensor, own) == [expected] * tensor


@pytest.mark.parametrize(("own", "expected"), [(None, "1"), ("8", "8")])
def test_ranks_have_their_queues_before_they_import_anything(monkeypatch, own, expected):
    """CUDA reads the variable when it starts, and DeepSpeed's import looks for a GPU."""
    for name in (QUEUES, "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv(QUEUES, own)
    found, parallel = [], ParallelConfig(tokens_per_rank=32, tensor=2)
    monkeypatch.setattr(start, "run", lambda _: found.append(os.environ[QUEUES]))
    assert start.start_ranks("longring.launch.train", [], 2, gpu_queues=parallel.gpu_queues) == 0
    assert found == [expected]


@pytest.mark.parametrize("resolved", [False, True])
def test_a_machine_without_localhost_is_told_in_one_line(monkeypatch, capsys, resolved):
    """Nothing resolves it, or it is the address of another machine; with it, the same start returns 0."""
    for name in (QUEUES, "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "1")

    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    def run(_):
        assert resolved, "torchrun would try for minutes"
        raise RendezvousError("The connection failed.") from DistNetworkError("no address of (localhost, 0)\nmore")

    with monkeypatch.context() as patch:
        if not resolved:
            patch.setattr(socket, "getaddrinfo", unknown)
        patch.setattr(start, "run", run)
        assert start.start_ranks("longring.launch.train", [], 2) == USER_ERROR
    [line] = capsys.readouterr().err.splitlines()
    reason = "no address of (localhost, 0)" if resolved else "[Errno -2] Name or service not known"
    advice = "see that it is this machine: /etc/hosts has a line 127.0.0.1 localhost"
    assert line == f"error: localhost: {reason}; {advice}"
    monkeypatch.setattr(start, "run", lambda _: None)
    assert start.start_ranks("longring.launch.train", [], 2) == 0


def test_ctrl_c_ends_ranks_and_their_launcher_with_130(monkeypatch, capsys):
    for name in (QUEUES, "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "1")
    for name, value in variables_of(0, 1).items():
        monkeypatch.setenv(name, value)

    def interrupted_launcher(_):
        raise SignalException("Process 7 got signal: 2", signal.SIGINT)

    def interrupted_rank():
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "run", interrupted_launcher)
    assert start.start_ranks("longring.launch.train", [], 2) == as_rank(interrupted_rank) == 130
    assert capsys.readouterr().err == ""


def test_the_directory_of_compiled_kernels_is_of_this_user_alone(tmp_path, monkeypatch):
    assert private_directory(tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    assert private_directory(tmp_path / "open").stat().st_mode & 0o777 == 0o700
    with pytest.raises(ValueError, match=r"link is not a directory of user \d+; set it to a directory of your own"):
        private_directory(tmp_path / "link")
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(ValueError, match=r"TRITON_CACHE_DIR: not set, and its default .*open is not a directory of us"):
        private_directory(tmp_path / "open")


def triton_cache(recipe_file: Path, directory: Path, own: str | None) -> str:
    """Return TRITON_CACHE_DIR as `join` leaves it on a GPU, or its error; `directory` holds another user's default."""
    os.environ.pop("TRITON_CACHE_DIR", None)
    if own:
        os.environ["TRITON_CACHE_DIR"] = own
    tempfile.tempdir = str(directory)
    torch.cuda.is_available, torch.cuda.set_device = lambda: True, lambda _: None
    dist.is_initialized = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    try:
        join(load_recipe(recipe_file).parallel, 1)
    except ValueError as error:
        return str(error)
    except KeyboardInterrupt:
        return os.environ["TRITON_CACHE_DIR"]
    return "joined"


@pytest.mark.full
def test_a_cache_of_another_user_is_refused_and_the_advice_helps(on_ranks, recipe_file, tmp_path):
    (tmp_path / f"triton-{os.getuid()}").symlink_to("/nowhere")
    [said] = on_ranks(1, triton_cache, recipe_file, tmp_path, None)
    assert "set it to a directory of your own on a local disk" in said
    assert on_ranks(1, triton_cache, recipe_file, tmp_path, str(tmp_path / "mine")) == [str(tmp_path / "mine")]
    (tmp_path / f"triton-{os.getuid()}").unlink()
    assert on_ranks(1, triton_cache, recipe_file, tmp_path, None) == [str(tmp_path / f"triton-{os.getuid()}")]


def opened(recipe_file: Path) -> list[str]:
    settings = ["parallel.zero_stage=3", "parallel.tensor=2", "train.memory.activations=offload"]
    recipe = load_recipe(recipe_file, [*settings, "train.dtype=bfloat16", "parallel.tokens_per_rank=256"])
    mesh = join(recipe.parallel, 2)
    order = preflight(recipe, mesh.world_size).order
    return opening(recipe, order, build_engine(recipe, 500, mesh), mesh, 500)


@pytest.mark.full
def test_a_start_tells_what_it_is_about_to_train(on_ranks, recipe_file):
    layer = 8 * 16 * 64 + 64 * 64 + 3 * 96 * 64 + 2 * 64
    ranks, parameters, step, passes, memory = on_ranks(4, opened, recipe_file)[0]
    assert ranks == "ranks: 4 (2 data-parallel x 2 tensor-parallel), rings of up to 2, ZeRO 3"
    assert parameters.startswith(
        f"parameters: {2 * 512 * 64 + 2 * layer + 64:,} in bfloat16, gradients summed in float32"
    )
    assert parameters.endswith("activations: offload")
    assert step == "a step: 2,048 tokens, as 4 micro-batches of 256 tokens on each data-parallel rank"
    assert re.match(r"memory of a rank: [\d.e-]+ GiB predicted, at the peak in the \w+ \(\w+ [\d.e-]+, ", memory)
    assert not memory.endswith("on the host 0 GiB"), "activations wait there"
    found = dict(re.findall(r"(\d+): ([\d.]+)", passes.partition(" steps: ")[2]))
    order = preflight(load_recipe(recipe_file), 1).order
    assert found == {str(bucket.length): f"{bucket.passes:.3g}" for bucket in order.trained(20)}
    assert list(found) == ["64", "128", "256", "512"]
