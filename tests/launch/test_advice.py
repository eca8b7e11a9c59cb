"""The advice of error messages works: after it is carried out, the error is gone.

Advice that takes a whole training run is tried where the run is: a full disk in test_faults.py, damaged checkpoints in
checkpoint/test_checkpoint.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers.ranks import variables_of
from helpers.sandbox import Sandbox
from helpers.small_checkpoint import make_checkpoint
from longring.data.files import sha256_of
from longring.launch import cli, run_directory
from longring.launch.commands import evaluate as evaluate_command
from longring.launch.commands import plan as plan_command
from longring.launch.commands import topology as topology_command
from longring.launch.commands import train as train_command
from longring.launch.commands.submit import requeue
from longring.launch.config import FaultsConfig
from longring.launch.grids.choice import check_named_grids
from longring.launch.grids.remembered import recall_grids
from longring.launch.loss_watch import LossWatch
from longring.launch.preflight import Preflight, preflight
from longring.launch.ranks.node import check_node
from longring.launch.ranks.rank import as_rank
from longring.launch.settings import MAX_BYTES, parse_part, to_tree


class Setting(NamedTuple):
    """Wrong settings, the advice of their error, and the settings that the advice leads to."""

    wrong: tuple[str, ...]
    advice: str
    """Regular expression; its groups are the numbers that the message gives."""
    right: tuple[str, ...]
    """The settings after the advice; {0} is the first group. "ranks=N" is the number of ranks, 4 if it is not given."""


OVER_4 = "parallel.tokens_per_rank=128"
STAGE_3 = "parallel.zero_stage=3"
HELD_TWICE = (STAGE_3, "parallel.zero.zero_hpz_partition_size=2")
SHORT = ("data.min_bucket_tokens=1", "parallel.tensor=2")
TEXTS, TOKENS = "data.source.path=texts", "data.source.tokens_field=ids"
NO_SOURCE = "data.source.kind=python_stdlib", "data.source.path=''"
IN_CONTEXT, PACKED = ("order.mode=in_context", "order.directory=ordered"), "data.rest=pack"
SETTINGS = [
    Setting(("train.stepz=9",), r"did you mean (train\.steps)\?", ("{0}=9",)),
    Setting(("trian.steps=9",), r"did you mean (train)\?", ("{0}.steps=9",)),
    Setting(("nonsense=1",), r"remove it\. Known here: .*train", ()),
    Setting(("train.steps",), r"such as (train\.steps=20)", ("{0}",)),
    Setting(("train.steps.more=1",), "leave out what follows it", ("train.steps=9",)),
    Setting(("train.steps=9", "train.warmup_steps=9"), "lower them", ("train.steps=9", "train.warmup_steps=8")),
    Setting(("train.steps=9", "train.decay_steps=6"), "or raise (train.steps)", ("{0}=10", "train.decay_steps=6")),
    Setting(
        ("train.cooldown_steps=2",),
        "needs both above 0",
        ("train.cooldown_steps=2", "train.constant_learning_rate=2e-3"),
    ),
    Setting(
        ("train.constant_learning_rate=2e-3",), "without one set both to (0)", ("train.constant_learning_rate={0}",)
    ),
    Setting(("train.initial_learning_rate=1",), "lower it", ("train.initial_learning_rate=3e-3",)),
    Setting(
        ("train.decay=exponential", "train.min_learning_rate=0"),
        r"raise (train\.min_learning_rate)",
        ("train.decay=exponential", "{0}=1e-5"),
    ),
    Setting(
        ("train.decay=exponential", "train.min_learning_rate=0"),
        r"or set train\.decay = '(\w+)'",
        ("train.decay={0}", "train.min_learning_rate=0"),
    ),
    Setting(("init.moments=true",), "name a run or a checkpoint, or set it to (false)", ("init.moments={0}",)),
    Setting(("curriculum.odds=3",), "or numbers", ("curriculum.odds=[3, 2, 1, 1]",)),
    Setting(("curriculum.odds=[]",), "give one number for each bucket", ("curriculum.odds=[3, 2, 1, 1]",)),
    Setting(("knots.chunk_odds=[0]",), r"give the odds of 1, 2, \.\.\. chunks", ("knots.chunk_odds=[1, 2]",)),
    Setting(("data.tokenizer.knot_chunks=1",), r"set it to (0) for no knots", ("data.tokenizer.knot_chunks={0}",)),
    Setting(
        ("data.shard_tokens=256",), r"set it to data\.max_bucket_tokens = (\d+) or more", ("data.shard_tokens={0}",)
    ),
    Setting(
        (OVER_4, "parallel.cp.schedule=query=2"),
        r"set (parallel\.cp\.schedule_of\.4) to a grid of 4 ranks",
        (OVER_4, "parallel.cp.schedule=query=2", "{0}=query=4"),
    ),
    Setting(("data.directory=''",), "name the one for the prepared data", ("data.directory=prepared",)),
    Setting(
        ("data.sources.'a b'={kind = 'text', path = 'b'}",),
        r"must consist of letters, digits, '-' and '_'; rename it",
        (*NO_SOURCE, "data.sources.a-b={{kind = 'text', path = 'b'}}"),
    ),
    Setting(
        ("knots.share=0.5",),
        r"set it to (3) and prepare the data anew",
        ("knots.share=0.5", "data.tokenizer.knot_chunks={0}"),
    ),
    Setting(("knots.share=0.5",), r"or set (knots\.share) = (0)", ("{0}={1}",)),
    Setting(
        ("model.window_tokens=8",),
        "the first above 0 and 'window' in the second; without windowed layers set 0 and",
        ("model.window_tokens=8", "model.layer_pattern=['window', 'full']"),
    ),
    Setting(
        ("model.layer_pattern=['window']",),
        r"without windowed layers set (0) and (\['full'\])",
        ("model.window_tokens={0}", "model.layer_pattern={1}"),
    ),
    Setting(("model.layer_pattern=[]",), r"names no layer; set it to (\['full'\])", ("model.layer_pattern={0}",)),
    Setting(("model.num_heads=7",), "change one of them, or set model.head_dim", ("model.num_heads=8",)),
    Setting(
        ("model.num_heads=6", "model.num_kv_heads=6"),
        r"or set (model\.head_dim)",
        ("model.num_heads=6", "model.num_kv_heads=6", "{0}=16"),
    ),
    Setting(("model.num_kv_heads=3",), r"divide model\.num_heads = 4; set it to (2)", ("model.num_kv_heads={0}",)),
    Setting(("model.num_kv_heads=8",), r"divide model\.num_heads = 4; set it to (4)", ("model.num_kv_heads={0}",)),
    Setting(("model.head_dim=7",), r"rotates pairs of dims; set it to (8)", ("model.head_dim={0}",)),
    Setting(
        ("model.rope_scaling.factor=8",),
        "which takes no other setting; remove it, or set another kind",
        ("model.rope_scaling.factor=8", "model.rope_scaling.kind=linear"),
    ),
    Setting(
        ("model.rope_scaling={kind='linear', beta_fast=8}",), "which takes factor, full_layers_only; remove it", ()
    ),
    Setting(
        ("model.rope_scaling={kind='yarn', factor=8}",),
        "set it to the context length of the original training",
        ("model.rope_scaling={{kind='yarn', factor=8, original_tokens=8192}}",),
    ),
    Setting(
        ("model.rope_scaling={kind='llama3', factor=8, original_tokens=8192, low_frequency_factor=4}",),
        r"must be below model\.rope_scaling\.high_frequency_factor = 4.0; lower it",
        ("model.rope_scaling={{kind='llama3', factor=8, original_tokens=8192, low_frequency_factor=1}}",),
    ),
    Setting(
        ("model.rope_base=1", "model.rope_scaling={kind='yarn', factor=8, original_tokens=8192}"),
        "yarn needs a base above 1; raise it",
        ("model.rope_base=2", "model.rope_scaling={{kind='yarn', factor=8, original_tokens=8192}}"),
    ),
    Setting(
        ("model.head_dim=2", "model.rope_scaling={kind='ntk', factor=8}"),
        "ntk has no frequency to change; set it to 4 or more",
        ("model.head_dim=4", "model.rope_scaling={{kind='ntk', factor=8}}"),
    ),
    Setting(("data.source.path=''",), "set it to a file, a directory", (TEXTS,)),
    Setting(
        ("data.source.kind=python_stdlib",),
        "leave the path empty, or set data.source.kind",
        ("data.source.kind=python_stdlib", "data.source.path=''"),
    ),
    Setting(
        ("data.source.kind=text", TEXTS, TOKENS),
        r"leave it empty, or use a kind with fields, such as '(json)'",
        ("data.source.kind={0}", TEXTS, TOKENS, "data.tokenizer.path=tokenizer.json"),
    ),
    Setting(
        ("data.source.kind=json", TEXTS, TOKENS),
        "set it to the tokenizer that made them",
        ("data.source.kind=json", TEXTS, TOKENS, "data.tokenizer.path=tokenizer.json"),
    ),
    Setting(
        ("data.sources.b={kind = 'text', path = 'b'}",),
        r"move data\.source to (data\.sources) under a name",
        (*NO_SOURCE, "{0}.a={{kind = 'json', path = 'texts'}}", "{0}.b={{kind = 'text', path = 'b'}}"),
    ),
    Setting(("order.directory=ordered",), r"(remove it), or set order\.mode", ()),
    Setting(("order.mode=in_context",), "set it to the directory of the ordered data", (*IN_CONTEXT, PACKED)),
    Setting(
        ("order.mode=in_context", "order.directory=s3://a/b"),
        "name one, and copy the ordered data",
        (*IN_CONTEXT, PACKED),
    ),
    Setting(IN_CONTEXT, r"set data\.method = '(decompose)' and data\.rest = '(pack)'", (*IN_CONTEXT, "data.rest={1}")),
    Setting(
        (OVER_4, "parallel.cp.schedule_of={4='rings'}"),
        r"use one of these names or a grid such as '(query=2, kv=2)'",
        (OVER_4, "parallel.cp.schedule_of={{4='{0}'}}"),
    ),
    Setting(
        (OVER_4, "parallel.cp.schedule_of={4='rows=4'}"),
        r"is not NAME=VALUE; the names are heads, (query)",
        (OVER_4, "parallel.cp.schedule_of={{4='{0}=4'}}"),
    ),
    Setting(
        (OVER_4, "parallel.cp.schedule_of={four='ring'}"),
        "the key must be a number of ranks; write it in digits",
        (OVER_4, "parallel.cp.schedule_of={{4='ring'}}"),
    ),
    Setting(
        ("parallel.cp.topology=dragonfly",),
        r"must be one of probe, (\w+), .*; name one of these",
        ("parallel.cp.topology={0}",),
    ),
    Setting(
        ("parallel.tokens_per_rank=500",),
        r"must be a power of two; set it to (\d+)",
        ("parallel.tokens_per_rank={0}",),
    ),
    Setting(("knots.chunk_odds=2",), r"such as (\[1, 2\])", ("knots.chunk_odds={0}",)),
    Setting(("curriculum.shares=3",), r"such as {name = 1}", ("curriculum.shares={{documents = 1}}",)),
    Setting(
        ("curriculum.mix='micro_batch'", "curriculum.slot_tokens=512", "ranks=2"),
        r"one micro-batch on 2 ranks, which are all of one bucket; set it to (\d+)",
        ("curriculum.mix='micro_batch'", "curriculum.slot_tokens={0}", "ranks=2"),
    ),
    Setting(
        ("curriculum.slot_tokens=512", "ranks=1"),
        r"has one slot in a step; set it to (0), or set (curriculum.mix) = '(micro_batch)'",
        ("curriculum.slot_tokens=512", "{1}={2}", "ranks=1"),
    ),
    Setting(
        ("curriculum.min_bucket_tokens=256", "curriculum.max_bucket_tokens=128"),
        r"exceeds curriculum.max_bucket_tokens = (\d+); lower the first",
        ("curriculum.min_bucket_tokens={0}", "curriculum.max_bucket_tokens=128"),
    ),
    Setting(
        ("curriculum.shares.documents=[0, 1]",),
        r"must be a list of 2 numbers: (\[.*\])",
        ("curriculum.shares.documents=[{0}]",),
    ),
    Setting(
        ("train.global_batch_tokens=3000", "ranks=1"), r"set it to (\d+)", ("train.global_batch_tokens={0}", "ranks=1")
    ),
    Setting(("parallel.tensor=4",), r"set it to (\d+)", ("parallel.tensor={0}",)),
    Setting(("parallel.tensor=8", "ranks=8"), r"set it to (\d+)", ("parallel.tensor={0}", "ranks=8")),
    Setting(
        ("parallel.tensor=2", "model.ffn_hidden_size=97"),
        r"set it to (\d+)",
        ("parallel.tensor={0}", "model.ffn_hidden_size=97"),
    ),
    Setting(
        (*SHORT, "parallel.sequence_parallel=true"),
        r"set parallel\.sequence_parallel = (false)",
        (*SHORT, "parallel.sequence_parallel={0}"),
    ),
    Setting(
        (*HELD_TWICE, "parallel.tensor=2"),
        r"gives other weights; remove it, or set (parallel\.tensor) = (1)",
        (*HELD_TWICE, "{0}={1}"),
    ),
    Setting(
        ("parallel.zero.zero_hpz_partition_size=4", STAGE_3, "ranks=2"),
        r"set it to (\d+)",
        ("parallel.zero.zero_hpz_partition_size={0}", STAGE_3, "ranks=2"),
    ),
    Setting((OVER_4, "ranks=2"), r"start a multiple of (\d+) ranks", (OVER_4, "ranks={0}")),
    Setting((OVER_4, "ranks=2"), r"or set (parallel\.tokens_per_rank) = 256", ("{0}=256", "ranks=2")),
    Setting(("ranks=8",), r"set it to (\d+)", ("train.global_batch_tokens={0}", "ranks=8")),
    Setting(
        (OVER_4, "model.num_heads=2", "parallel.cp.schedule=ulysses"),
        r"set (parallel\.cp\.schedule) = (auto)",
        (OVER_4, "model.num_heads=2", "{0}={1}"),
    ),
    Setting(
        (f"data.directory={'a' * 300}",),
        r"300 bytes between two slashes: must have at most 3000 and (\d+); shorten it",
        (f"data.directory={'a' * 200}",),
    ),
    Setting(
        ("train.gradient_dtype=bfloat16",),
        r"is less exact than train\.dtype = 'float32'; set it to '?(float32)",
        ("train.gradient_dtype={0}",),
    ),
    Setting(("slurm.time=tomorrow",), r"look like (\S+) or", ("slurm.time={0}",)),
    Setting(("slurm.partition='gpu --wrap=x'",), "use no spaces and no quotes", ("slurm.partition=gpu",)),
    Setting(
        ("data.source.path=s3://me:secret@host/a",),
        "put it in the environment instead",
        ("data.source.path=s3://host/a",),
    ),
]


def check_settings(sandbox: Sandbox, settings: tuple[str, ...]) -> None:
    """Raise ValueError unless these settings can train."""
    ranks = [int(setting.removeprefix("ranks=")) for setting in settings if setting.startswith("ranks=")]
    recipe = sandbox.load(*(setting for setting in settings if not setting.startswith("ranks=")))
    recipe.accumulation_steps(ranks[0] if ranks else 4)
    check_named_grids(recipe)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"{' '.join(setting.wrong)}: {setting.advice}")
def test_advice_about_a_setting(setting, recipe_file, tmp_path, capsys):
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    with pytest.raises(ValueError, match=setting.advice) as error:
        check_settings(sandbox, setting.wrong)
    found = re.search(setting.advice, str(error.value))
    assert found is not None
    check_settings(sandbox, tuple(word.format(*found.groups()) for word in setting.right))


class Case(NamedTuple):
    """A mistake, and what its error advises."""

    mistake: Callable[[Sandbox], object]
    attempt: Callable[[Sandbox], object]
    """Fails with the error after the mistake, and succeeds after the advice."""
    advice: str
    """Regular expression."""
    carry_out: Callable[[Sandbox], object]


def command(*arguments: str) -> Callable[[Sandbox], None]:
    """Return an attempt that runs a command; {recipe}, {run} and {directory} stand for those of the sandbox."""

    def attempt(sandbox: Sandbox) -> None:
        names = {"recipe": sandbox.recipe, "run": sandbox.run.path, "directory": sandbox.directory}
        sandbox.capsys.readouterr()
        if cli.main([argument.format(**names) for argument in arguments]):
            raise ValueError(" ".join(sandbox.capsys.readouterr().err.split()))

    return attempt


def checked(*overrides: str) -> Callable[[Sandbox], Preflight]:
    """Return an attempt that checks recipe, data, run directory and checkpoints as a start does."""
    return lambda sandbox: preflight(sandbox.load(*(word.format(directory=sandbox.directory) for word in overrides)), 4)


def nothing(_: Sandbox) -> None:
    pass


def other_file(sandbox: Sandbox) -> None:
    sandbox.run.path.mkdir()
    (sandbox.run.path / "chapter.tex").write_text("...")


def truncated_recipe(sandbox: Sandbox) -> None:
    sandbox.begin()
    sandbox.run.recipe_file.write_text(sandbox.run.recipe_file.read_text()[:50])


def truncated_grids(sandbox: Sandbox) -> None:
    sandbox.run.path.mkdir()
    sandbox.run.grids_file.write_text("{")


def data_changed_after_a_checkpoint(sandbox: Sandbox) -> None:
    manifest = sandbox.data / "manifest.json"
    begun_with_checkpoint(sandbox)
    manifest.write_text(manifest.read_text() + "\n")


def restore_data(sandbox: Sandbox) -> None:
    manifest = sandbox.data / "manifest.json"
    manifest.write_text(manifest.read_text().removesuffix("\n"))


def begun_with_checkpoint(sandbox: Sandbox) -> None:
    assert sandbox.data.is_dir()
    sandbox.begin()
    checkpoint_of_this_run(sandbox)


def checkpoint_of_this_run(sandbox: Sandbox) -> None:
    hashed = sha256_of(sandbox.data / "manifest.json")
    make_checkpoint(sandbox.run.checkpoints, 5, data=hashed, recipe=to_tree(sandbox.load()))


def checkpoint_of_another_run(sandbox: Sandbox) -> None:
    begun_with_checkpoint(sandbox)
    sandbox.run.record_start({"run": "2" * 32})


def move_checkpoint(sandbox: Sandbox) -> None:
    (sandbox.directory / "its own").mkdir()
    sandbox.run.checkpoints.rename(sandbox.directory / "its own" / "checkpoints")


def lost_checkpoints(sandbox: Sandbox) -> None:
    sandbox.begin()
    sandbox.run.record_save(5)


def unwritable_checkpoints(sandbox: Sandbox) -> None:
    sandbox.begin()
    sandbox.run.checkpoints.symlink_to("/sys/kernel")


def requeue_thrice(sandbox: Sandbox) -> None:
    for _ in range(3):
        requeue(sandbox.load("slurm.max_fruitless_starts=1"))


def requeue_again(sandbox: Sandbox) -> None:
    verdict = requeue(sandbox.load("slurm.max_fruitless_starts=1"))
    if not verdict.again:
        raise ValueError(verdict.reason)


def rank_without_torchrun(sandbox: Sandbox) -> None:
    sandbox.capsys.readouterr()
    if as_rank(lambda: 0):
        raise ValueError(" ".join(sandbox.capsys.readouterr().err.split()))


def rank_out_of_memory(sandbox: Sandbox) -> None:
    """The first attempt fails as on a full GPU; the second has the settings of the advice, in the same run."""
    if not os.environ.get("LESS_MEMORY"):
        os.environ.update(variables_of(0, 1))

        def fail() -> int:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

        assert as_rank(fail) == 2
        raise ValueError(" ".join(sandbox.capsys.readouterr().err.split()))
    for settings in (["parallel.tokens_per_rank=256"], ["parallel.zero_stage=3"], ["parallel.tensor=2"]):
        checked(*settings)(sandbox)


def too_many_spikes(_: Sandbox) -> None:
    if not os.environ.get("SPIKES_ANSWERED"):
        LossWatch(FaultsConfig(max_rewinds=0)).rewound(7, 9.5, None)


def continue_with(*attempts: Callable[[Sandbox], object]) -> Callable[[Sandbox], None]:
    """Return an advice that consists of other starts, each of which must pass; the first attempt is then over."""

    def carry_out(sandbox: Sandbox) -> None:
        for attempt in attempts:
            attempt(sandbox)
        os.environ["SPIKES_ANSWERED"] = os.environ["LESS_MEMORY"] = "1"

    return carry_out


def new_run_directory(sandbox: Sandbox) -> None:
    sandbox.run = run_directory.RunDirectory(sandbox.directory / "another")


def unlink(name: str) -> Callable[[Sandbox], None]:
    return lambda sandbox: getattr(sandbox.run, name).unlink()


def set_environment(name: str, value: str) -> Callable[[Sandbox], None]:
    return lambda _: os.environ.update({name: value})


SLURM = ("slurm.cpu=true", "slurm.min_free_memory_gb=0")
CASES = {
    "another recipe: name another run_directory": Case(
        begun_with_checkpoint,
        checked("train.learning_rate=0.5"),
        "train.learning_rate = 0.5: was 0.003 in the 5 steps done, .* or name another run_directory",
        new_run_directory,
    ),
    "another run's checkpoint: move it": Case(
        checkpoint_of_another_run, checked(), "move it to the directory of its own run", move_checkpoint
    ),
    "another run's checkpoint: name another run_directory": Case(
        checkpoint_of_another_run, checked(), "or name another run_directory", new_run_directory
    ),
    "other files: name a new directory": Case(other_file, checked(), "name a new directory", new_run_directory),
    "a damaged recipe.json: remove it": Case(
        truncated_recipe,
        lambda sandbox: sandbox.run.recipe(),
        "remove it, and the next `longring train`",
        lambda sandbox: (sandbox.run.recipe_file.unlink(), checked()(sandbox), sandbox.run.create(sandbox.load())),
    ),
    "a recipe.json without a table: remove it": Case(
        lambda sandbox: (sandbox.begin(), sandbox.run.recipe_file.write_text("[]")),
        lambda sandbox: sandbox.run.recipe(),
        "it holds no table; remove it, and the next `longring train`",
        lambda sandbox: (sandbox.run.recipe_file.unlink(), checked()(sandbox), sandbox.run.create(sandbox.load())),
    ),
    "a damaged grids.json: remove it": Case(
        truncated_grids, lambda sandbox: recall_grids(sandbox.run.grids_file, ""), "remove it", unlink("grids_file")
    ),
    "other data: bring back the old data": Case(
        data_changed_after_a_checkpoint, checked(), "bring back the old data", restore_data
    ),
    "other data: name another run_directory": Case(
        data_changed_after_a_checkpoint, checked(), "or name another run_directory", new_run_directory
    ),
    "not a run directory: train": Case(
        lambda sandbox: sandbox.run.path.mkdir(),
        command("checkpoints", "{run}"),
        "name the directory of a run that `longring train` has started",
        lambda sandbox: sandbox.begin(),
    ),
    "lost checkpoints: bring a copy back": Case(
        lost_checkpoints,
        checked(),
        "mount its disk or bring a copy back",
        checkpoint_of_this_run,
    ),
    "lost checkpoints: name another run_directory": Case(
        lost_checkpoints, checked(), "or name another run_directory to start from the first step", new_run_directory
    ),
    "checkpoints that cannot be written: allow it": Case(
        unwritable_checkpoints,
        lambda sandbox: sandbox.run.check_writable(),
        "allow this user to write there",
        lambda sandbox: sandbox.run.checkpoints.unlink(),
    ),
    "no checkpoint: train first": Case(
        lambda sandbox: sandbox.begin(),
        command("evaluate", "{run}"),
        "train first, with `longring train`",
        checkpoint_of_this_run,
    ),
    "no torchrun: start with torchrun": Case(
        nothing, rank_without_torchrun, "start with torchrun", lambda _: os.environ.update(variables_of(0, 1))
    ),
    "not enough GPU memory: other settings continue the run": Case(
        begun_with_checkpoint,
        rank_out_of_memory,
        "lower parallel.tokens_per_rank, or raise parallel.zero_stage or parallel.tensor, and the same command",
        continue_with(),
    ),
    "too many spikes: leave out more batches, or a new run directory": Case(
        begun_with_checkpoint,
        too_many_spikes,
        "raise faults.spike_skip_steps .* or lower train.learning_rate in a new run_directory",
        continue_with(
            checked("faults.spike_skip_steps=5"),
            checked("train.learning_rate=2e-3", "run_directory={directory}/slower"),
        ),
    ),
    "an unfit node: lower the requirement": Case(
        nothing,
        lambda sandbox: check_node(
            sandbox.load(*SLURM, f"slurm.min_free_disk_gb={os.environ.get('NEEDED_GB', '1e9')}"), 2
        ),
        r"\(slurm\.min_free_disk_gb.* lower the requirement",
        set_environment("NEEDED_GB", "0"),
    ),
    "no progress: submit again": Case(
        requeue_thrice,
        requeue_again,
        "look at the output and at .*, then submit again",
        set_environment("SLURM_JOB_ID", "8"),
    ),
}


@pytest.fixture
def no_ranks(monkeypatch):
    """Let a command end where it would start ranks."""
    for module in (evaluate_command, plan_command, topology_command, train_command):
        monkeypatch.setattr(module, "start_ranks", lambda *_, **__: 0)


@pytest.mark.parametrize("name", CASES)
def test_advice_about_a_run(name, recipe_file, tmp_path, capsys, monkeypatch, no_ranks):
    for variable in (*variables_of(0, 1), "NEEDED_GB", "SPIKES_ANSWERED", "LESS_MEMORY"):
        monkeypatch.setenv(variable, "")  # so that it is restored, and then
        monkeypatch.delenv(variable)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    sandbox, case = Sandbox(recipe_file, tmp_path, capsys), CASES[name]
    case.mistake(sandbox)
    with pytest.raises((ValueError, ArithmeticError, OSError), match=case.advice):
        case.attempt(sandbox)
    case.carry_out(sandbox)
    case.attempt(sandbox)


ARGUMENTS = {
    "several nodes without a rendezvous": (
        ["train", "{recipe}", "--nodes", "2", "--ranks", "2", "run_directory={directory}/r"],
        "need --rendezvous, --job and --address too; give them as in slurm/train.sbatch",
        ["--rendezvous", "n1:29500", "--job", "7-0", "--address", "n1"],
    ),
    "a rendezvous without a port": (
        [
            *("train", "{recipe}", "run_directory={directory}/r", "--nodes", "2", "--ranks", "2"),
            *("--job", "7-0", "--address", "n1", "--rendezvous", "n1"),
        ],
        "must be HOST:PORT with a port from 1 to 65535; give it as in slurm/train.sbatch",
        ["--rendezvous", "n1:29500"],
    ),
    "nothing to measure into": (
        ["plan", "{recipe}", OVER_4, "parallel.cp.topology=full_mesh", "--measure"],
        "name the picture with --timeline",
        ["--timeline", "{directory}/OUT.png"],
    ),
    "no grid to measure": (
        ["plan", "{recipe}", "--timeline", "{directory}/OUT.png", "--measure"],
        "lower parallel.tokens_per_rank to measure a grid",
        [OVER_4, "parallel.cp.topology=full_mesh"],
    ),
    "nothing to draw": (
        ["plan", "{recipe}", "--timeline", "{directory}/OUT.png"],
        "lower parallel.tokens_per_rank",
        [OVER_4, "parallel.cp.topology=full_mesh"],
    ),
    "an unknown topology": (
        ["plan", "{recipe}", OVER_4, "--topology", "token_ring"],
        "must be one of .*full_mesh",
        ["--topology", "full_mesh"],
    ),
    "one rank without links": (["topology", "--ranks", "1"], "with --ranks 2", ["--ranks", "2"]),
    "no Slurm here": (
        ["submit", "{recipe}", "--nodes", "1", "slurm.ranks_per_node=4"],
        "or print the job with --print",
        ["--print"],
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_advice_about_arguments(name, recipe_file, tmp_path, capsys, monkeypatch, no_ranks):
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    arguments, advice, more = ARGUMENTS[name]
    with pytest.raises(ValueError, match=advice):
        command(*arguments)(sandbox)
    command(*arguments, *more)(sandbox)


def test_advice_to_make_the_directory_of_a_picture(recipe_file, tmp_path, capsys):
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    draw = command("plan", "{recipe}", OVER_4, "parallel.cp.topology=full_mesh", "--timeline", "{directory}/new/a.png")
    with pytest.raises(ValueError, match="is not a directory; make it first"):
        draw(sandbox)
    (tmp_path / "new").mkdir()
    draw(sandbox)


def test_advice_to_leave_out_or_to_restore_a_setting(recipe_file, tmp_path, capsys, no_ranks):
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    begun_with_checkpoint(sandbox)
    with pytest.raises(ValueError, match=r"only evaluate.\* and parallel.\* may differ from the run; leave it out"):
        command("evaluate", "{run}", "train.steps=1")(sandbox)
    command("evaluate", "{run}")(sandbox)
    changed = [*("train.learning_rate=0.5", "train.warmup_steps=9"), "curriculum.cycles=4"]
    with pytest.raises(ValueError, match="train.learning_rate = 0.5, train.warmup_steps = 9: was 0.003, 4 in the 5 "):
        checked(*changed)(sandbox)
    with pytest.raises(ValueError, match=r"curriculum.cycles = 4: was 2 in .* set it back to 2, or name"):
        checked(changed[-1])(sandbox)
    assert checked()(sandbox).steps_done == 5


def test_advice_about_the_ranks_of_an_evaluation(recipe_file, tmp_path, capsys, no_ranks):
    """A sequence of 512 tokens takes 4 ranks of 128, in any number of such rings."""
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    begun_with_checkpoint(sandbox)
    for division, ranks in ((OVER_4, "3"), (OVER_4, "2"), ("parallel.tensor=2", "3")):
        with pytest.raises(ValueError, match="start a multiple of [24] ranks"):
            command("evaluate", "{run}", "--ranks", ranks, division)(sandbox)
    command("evaluate", "{run}", "--ranks", "12", OVER_4)(sandbox)
    command("evaluate", "{run}", "--ranks", "6", "parallel.tensor=2")(sandbox)
    with pytest.raises(ValueError, match="or set parallel.tokens_per_rank = 512"):
        command("evaluate", "{run}", "--ranks", "3", OVER_4)(sandbox)
    command("evaluate", "{run}", "--ranks", "3", "parallel.tokens_per_rank=512")(sandbox)


def test_advice_about_a_directory_in_use(recipe_file, tmp_path, capsys, monkeypatch):
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    monkeypatch.setattr(run_directory, "_LOCK_WAIT_S", 0)
    advice = pytest.raises(ValueError, match="end it, or name another run_directory")
    with sandbox.run.held():
        with advice:
            sandbox.run.held().__enter__()
        with run_directory.RunDirectory(tmp_path / "another").held():
            pass
    with sandbox.run.held():
        pass


def test_advice_about_data_without_a_recipe(recipe_file, tmp_path, capsys, monkeypatch):
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    monkeypatch.chdir(tmp_path)
    assert sandbox.data.is_dir()
    with pytest.raises(ValueError, match="name a recipe"):
        command("inspect", "{directory}/data", "train.steps=3")(sandbox)
    command("inspect", "{recipe}", "train.steps=3", "train.warmup_steps=0")(sandbox)


def test_advice_about_a_part():
    with pytest.raises(ValueError, match="such as 0/8"):
        parse_part("3/3")
    assert parse_part("0/8") == (0, 8)


RECIPES: dict[str, tuple[Callable[[str], str], str, Callable[[str], str]]] = {
    "no TOML": (
        lambda text: f"steps = = 3\n{text}",
        "not valid TOML: .*; correct the file",
        lambda text: text.removeprefix("steps = = 3\n"),
    ),
    "too long": (
        lambda text: text + "#" * MAX_BYTES,
        f"has more than {MAX_BYTES} bytes; name a TOML file with settings",
        lambda text: text.rstrip("#"),
    ),
    "a key that is missing": (
        lambda text: text.replace("num_layers = 2\n", ""),
        r"model\.num_layers: missing, and it has no default; set it",
        lambda text: text.replace("[model]\n", "[model]\nnum_layers = 3\n"),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_advice_about_the_file_of_a_recipe(name, recipe_file, tmp_path, capsys):
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    spoil, advice, mend = RECIPES[name]
    sandbox.recipe.write_text(spoil(sandbox.recipe.read_text()))
    with pytest.raises(ValueError, match=advice):
        sandbox.load()
    sandbox.recipe.write_text(mend(sandbox.recipe.read_text()))
    sandbox.load()


@pytest.mark.parametrize("other", [("--slurm", "main"), ("--part", "0/2")], ids=" ".join)
def test_advice_about_verify(other, recipe_file, tmp_path, capsys):
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    with pytest.raises(ValueError, match="leave out --slurm and --part"):
        command("prepare", "{recipe}", "--verify", *other)(sandbox)
    command("prepare", "{recipe}", "--verify", "--workers", "1")(sandbox)
