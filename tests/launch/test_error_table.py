"""docs/errors.md: the table of all mistakes and their messages. Its rows are the messages that these tests see.

LONGRING_WRITE_ERRORS=1 pytest tests/launch/test_error_table.py        writes the page again
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest
import torch
from helpers.containers import npy, tar
from helpers.ranks import variables_of
from helpers.sandbox import Sandbox
from helpers.small_checkpoint import STATE, make_checkpoint
from longring.data import files
from longring.data.files import sha256_of, sha256_of_json
from longring.data.lock import held
from longring.launch import run_directory
from longring.launch import train as train_module
from longring.launch.agreement import agree
from longring.launch.commands.submit import requeue
from longring.launch.config import FaultsConfig, load_recipe
from longring.launch.errors import GO_ON_LATER, GPU_ERROR, USER_ERROR
from longring.launch.identity import identity_of
from longring.launch.loss_watch import LossWatch
from longring.launch.ranks.node import check_node
from longring.launch.ranks.rank import as_rank
from longring.launch.ranks.watchdog import Position, diagnosis
from longring.launch.settings import to_tree
from longring.parallel.meet import meet
from longring.parallel.world import World
from torch._C._distributed_c10d import HashStore

DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"
BAR = "\\|"
HEAD = """# Errors

Mistakes and faults, and the message of each on standard error after `error: `. A message names a key or a file, says
what is wrong with it, and after the semicolon what to do. Each row is a message that a test sees
(`tests/launch/test_error_table.py`, which also writes this page); paths and hashes are shortened to `…`.
`tests/launch/test_advice.py` and `tests/data/test_config.py` carry advice out and see the error gone. The status is
2 for errors that only a person can correct, and 74 for files that cannot be read or written; a row names any other, and
[faults.md](faults.md) explains them all.
"""


Case = Callable[[Sandbox], str]
SETTINGS: dict[str, str] = {
    "an unknown key": "train.stepz=1",
    "an unknown table": "trian.steps=1",
    "a fraction in place of a count": "train.steps=2.5",
    "true in place of a number": "train.steps=true",
    "a word in place of a number": "train.learning_rate=fast",
    "a number in place of a table": "train=3",
    "an override without `=`": "train.steps",
    "a key below a value": "train.steps.more=1",
    "an unknown dtype": "train.dtype=float16",
    "no steps": "train.steps=0",
    "a batch of no tokens": "train.global_batch_tokens=0",
    "a batch that is not a multiple of the longest sequence": "train.global_batch_tokens=3000",
    "warm-up longer than the run": "train.warmup_steps=5000",
    "a minimum learning rate above the peak": "train.min_learning_rate=1.0",
    "a negative limit of the gradient norm": "train.clip_grad_norm=-1.0",
    "bf16 sums of fp32 gradients": "train.gradient_dtype=bfloat16",
    "no checkpoint to keep": "train.keep_checkpoints=0",
    "a number that is not finite": "train.clip_grad_norm=nan",
    "a decay rate above one": "train.beta1=1.5",
    "more steps than a checkpoint's name can hold": "train.steps=9223372036854775808",
    "a line break in a path": 'data.directory="a\\nb"',
    "an unknown attention backend": "train.attention_backend=cuda",
    "spikes detected from one loss": "faults.spike_window_steps=1",
    "a negative limit of a hang": "faults.hang_minutes=-1.0",
    "no failed save allowed": "faults.max_failed_saves=0",
    "no non-finite step allowed": "faults.max_nonfinite_steps=0",
    "a malformed time limit": "slurm.time=tomorrow",
    "a space in an sbatch option": "slurm.partition='gpu --wrap=x'",
    "a malformed name of an sbatch option": "slurm.options={'a b'='1'}",
    "an sbatch option that starts a program": "slurm.options={wrap='x'}",
    "no ranks on a node": "slurm.ranks_per_node=0",
    "tokens per rank that are not a power of two": "parallel.tokens_per_rank=500",
    "an unknown ZeRO stage": "parallel.zero_stage=4",
    "a tensor-parallel degree that does not divide the heads": "parallel.tensor=3",
    "a tensor-parallel degree that does not divide the kv heads": "parallel.tensor=4",
    "sequence parallelism without tensor parallelism": "parallel.sequence_parallel=true",
    "a number of CTAs that is not a power of two": "parallel.cp.max_ctas=12",
    "heads that do not divide the width": "model.num_heads=7",
    "kv heads that do not divide the heads": "model.num_kv_heads=3",
    "no layers": "model.num_layers=0",
    "a bucket that is not a power of two": "data.max_bucket_tokens=3000",
    "a smallest bucket above the largest": "data.min_bucket_tokens=1024",
    "all documents held out": "data.held_out_fraction=1.0",
    "a fraction above one": "data.max_bad_fraction=1.5",
    "a vocabulary smaller than the bytes": "data.tokenizer.vocab_size=100",
    "no boundary token": "data.tokenizer.boundary=''",
    "an unknown kind of source": "data.source.kind=csv",
    "no data directory": "data.directory=''",
    "a password in an address": "data.source.path=s3://me:secret@host/a",
    "a signed address": "data.source.path=https://host/a?X-Amz-Signature=0123abcd",
    "no cycle": "curriculum.cycles=0",
    "unknown odds": "curriculum.odds=grow",
    "negative odds": "curriculum.odds=[1,-2]",
    "a share above 1": "curriculum.shares={web=2}",
    "points of a share that do not ascend": "curriculum.shares.web=[[0.5, 0.1], [0, 0.3]]",
    "shares renewed after the only cycle": "curriculum={cycles=1, renewal={rate=0.1}}",
    "a slot in a step of one bucket": "curriculum.slot_tokens=512",
    "a slot that does not divide a step": "curriculum={mix='micro_batch', slot_tokens=1536}",
    "buckets that the data lacks": "curriculum.min_bucket_tokens=1024",
    "a shortest bucket above the longest": "curriculum={min_bucket_tokens=256, max_bucket_tokens=128}",
    "no micro-batch read ahead": "loader.prefetch_batches=0",
    "a negative bandwidth of hashing": "loader.hash_bytes_per_s=-1",
    "an evaluation of no tokens": "evaluate.max_tokens_per_bucket=0",
}


def setting(override: str) -> Case:
    return lambda sandbox: sandbox.train(override)


def broken_recipe(text: str | bytes) -> Case:
    def case(sandbox: Sandbox) -> str:
        sandbox.recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
        return sandbox.train()

    return case


def missing_data(sandbox: Sandbox) -> str:
    return sandbox.train(f"data.directory={sandbox.directory}/nowhere")


def missing_shard(sandbox: Sandbox) -> str:
    min(sandbox.data.rglob("train*.tar")).unlink()
    return sandbox.train()


def truncated_shard(sandbox: Sandbox) -> str:
    shard = min(sandbox.data.rglob("train*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    return sandbox.train()


def flipped_shard(sandbox: Sandbox) -> str:
    shard = min(sandbox.data.rglob("train*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    return sandbox.main("inspect", str(sandbox.data))


def name_that_leads_elsewhere(sandbox: Sandbox) -> str:
    file = sandbox.data / "manifest.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    content["files"]["../outside"] = "0" * 64
    file.write_text(json.dumps({**content, "sha256": sha256_of_json(content)}))
    return sandbox.train()


def link_out_of_the_data(sandbox: Sandbox) -> str:
    file = sandbox.data / "tokenizer.json"
    file.rename(sandbox.directory / "tokenizer.json")
    file.symlink_to(sandbox.directory / "tokenizer.json")
    return sandbox.train()


def second_preparation(sandbox: Sandbox) -> str:
    with held(sandbox.directory / "new.lock"):
        said = sandbox.main("prepare", str(sandbox.recipe), f"data.directory={sandbox.directory}/new")
    return re.sub(r"process \d+ on \S+ since [^;]+", "process … on … since …", said)


def manifest_cut_short(sandbox: Sandbox) -> str:
    file = sandbox.data / "manifest.json"
    file.write_text(file.read_text()[:200])
    return sandbox.train()


def manifest_of_the_future(sandbox: Sandbox) -> str:
    file = sandbox.data / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    return sandbox.train()


def another_tokenizer(sandbox: Sandbox) -> str:
    file = sandbox.data / "tokenizer.json"
    file.write_text(file.read_text().replace("Ġ", "Ġ ", 1))
    return sandbox.train()


def missing_table(sandbox: Sandbox) -> str:
    (sandbox.data / "shards.npy").unlink()
    return sandbox.train()


def prepare_from(sandbox: Sandbox, name: str, content: bytes) -> str:
    (sandbox.directory / name).write_bytes(content)
    settings = [f"data.directory={sandbox.directory}/new", f"data.source.path={sandbox.directory}/{name}"]
    return sandbox.main("prepare", str(sandbox.recipe), *settings)


def corpus(kind: str, files: dict[str, bytes], *settings: str) -> Case:
    """Return the preparation of a folder of files, with the tokenizer of the sandbox's data."""

    def case(sandbox: Sandbox) -> str:
        folder = sandbox.directory / "corpus"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        source = [f"data.source.kind={kind}", f"data.source.path={folder}", *settings]
        tokenizer = f"data.tokenizer.path={sandbox.data}/tokenizer.json"
        return sandbox.main(
            "prepare", str(sandbox.recipe), f"data.directory={sandbox.directory}/new", tokenizer, *source
        )

    return case


def arrow_stream(rows: dict[str, list[Any]]) -> bytes:
    content = io.BytesIO()
    table = pyarrow.table(rows)
    with pyarrow.ipc.new_stream(content, table.schema) as writer:
        writer.write_table(table)
    return content.getvalue()


def data_set_without_the_split(sandbox: Sandbox) -> str:
    import datasets  # two seconds, which the quick lane does not spend

    rows = datasets.Dataset.from_dict({"text": ["words"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(sandbox.directory / "disk"))
    settings = [f"data.source.path={sandbox.directory}/disk", "data.source.kind=disk", "data.source.split=valid"]
    return sandbox.main("prepare", str(sandbox.recipe), f"data.directory={sandbox.directory}/new", *settings)


IDS = np.array([5, 6, 0, 7, 8, 0] * 20, dtype="<u2")
"""Forty documents of two ids, each ended by the boundary."""
CORPORA: dict[str, Case] = {
    "a text in UTF-16": corpus("text", {"a.txt": "words".encode("utf-16")}),
    "a text that is no UTF-8": corpus("text", {"a.txt": b"words \xff"}),
    "records without the field of the text": corpus("json", {"a.jsonl": b'{"content": "words"}\n'}),
    "a field that is no text": corpus("json", {"a.jsonl": b'{"text": 3}\n'}),
    "a row of CSV with another number of values": corpus("csv", {"a.csv": b"id,text\n1,words,and words\n"}),
    "a file that is no parquet": corpus("parquet", {"a.parquet": b"words"}),
    "an Arrow stream without its end": corpus("arrow", {"a.arrow": arrow_stream({"text": ["words"]})[:-8]}),
    "a tar file without its end": corpus("webdataset", {"a.tar": tar([("a.txt", b"words")])[:1024]}),
    "a text in tar files where ids are asked": corpus(
        "webdataset", {"a.tar": tar([("a.txt", b"words")])}, "data.source.tokens_field=ids.npy"
    ),
    "token ids with EOS inside": corpus("json", {"a.jsonl": b'{"ids": [5, 0, 6]}\n'}, "data.source.tokens_field=ids"),
    "token ids of another tokenizer": corpus(
        "json", {"a.jsonl": b'{"ids": [5, 60000]}\n'}, "data.source.tokens_field=ids"
    ),
    "a stream of ids without EOS": corpus("tokens", {"a.npy": IDS[IDS > 0].tobytes()}),
    "a stream of ids of twice the width": corpus("tokens", {"a.bin": IDS.astype("<u4").tobytes()}),
    "a stream of ids that is cut": corpus("tokens", {"a.npy": npy(IDS)[:-2]}),
    "an .npy of floats": corpus("tokens", {"a.npy": npy(IDS.astype(float))}),
    "a .bin without its .idx": corpus("megatron", {"a.bin": IDS.tobytes()}),
    "an .idx that is cut": corpus("megatron", {"a.bin": IDS.tobytes(), "a.idx": b"MMIDIDX\0\0"}),
    "a data set without the split": data_set_without_the_split,
}


def prepare_with_tokenizer(sandbox: Sandbox, change: Callable[[dict[str, Any]], object]) -> str:
    content = json.loads((sandbox.data / "tokenizer.json").read_text())
    change(content)
    file = sandbox.directory / "tokenizer.json"
    file.write_text(json.dumps(content))
    settings = [f"data.directory={sandbox.directory}/new", f"data.tokenizer.path={file}"]
    return sandbox.main("prepare", str(sandbox.recipe), *settings)


def split_at(expression: str) -> Callable[[dict[str, Any]], object]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return lambda content: content.update(pre_tokenizer=split)


def missing_source(sandbox: Sandbox) -> str:
    settings = [f"data.directory={sandbox.directory}/new", "data.source.path=/nowhere/*.jsonl"]
    return sandbox.main("prepare", str(sandbox.recipe), *settings)


def directory_in_the_way(sandbox: Sandbox) -> str:
    (sandbox.directory / "thesis").mkdir()
    (sandbox.directory / "thesis" / "chapter.tex").write_text("...")
    return sandbox.main("prepare", str(sandbox.recipe), f"data.directory={sandbox.directory}/thesis")


def with_five_steps(override: str, **state: Any) -> Case:
    """Return the start, with an override, of a run that has done five steps."""

    def case(sandbox: Sandbox) -> str:
        sandbox.begin()
        data = sha256_of(sandbox.data / "manifest.json")
        make_checkpoint(sandbox.run.checkpoints, 5, data=data, recipe=to_tree(sandbox.load()), **state)
        sandbox.run.record_start({"run": STATE.run})
        return sandbox.train(override)

    return case


def ranks_that_differ(sandbox: Sandbox) -> str:
    """Return the error of four ranks of which two have other settings."""
    store = HashStore()

    def on_rank(rank: int) -> str:
        other = ["train.learning_rate=0.002"] if rank % 2 else []
        entries = identity_of(sandbox.load(*other), "d" * 64, "").common
        return refused(lambda: agree(store, rank, 4, entries))

    with ThreadPoolExecutor(4) as pool:
        return set(pool.map(on_rank, range(4))).pop()


def other_files_in_the_run(sandbox: Sandbox) -> str:
    sandbox.run.path.mkdir()
    (sandbox.run.path / "chapter.tex").write_text("...")
    return sandbox.train()


def second_run(sandbox: Sandbox) -> str:
    with pytest.MonkeyPatch.context() as patch, sandbox.run.held():
        patch.setattr(run_directory, "_LOCK_WAIT_S", 0)
        with pytest.raises(ValueError, match="in use by") as error:
            sandbox.run.held().__enter__()
    return re.sub(r"process \d+ on \S+ since [^;]+", "process … on … since …", str(error.value))


def no_run(sandbox: Sandbox) -> str:
    return sandbox.main("evaluate", str(sandbox.directory))


def no_checkpoint(sandbox: Sandbox) -> str:
    sandbox.begin()
    return sandbox.main("evaluate", str(sandbox.run.path))


def setting_of_a_finished_run(sandbox: Sandbox) -> str:
    sandbox.begin()
    return sandbox.main("evaluate", str(sandbox.run.path), "train.steps=1")


def checkpoint_of_other_data(sandbox: Sandbox) -> str:
    sandbox.begin()
    make_checkpoint(sandbox.run.checkpoints, 5)
    return sandbox.train()


def damaged(damage: Callable[[Path], object], name: str = "rank-00001.safetensors") -> Case:
    def case(sandbox: Sandbox) -> str:
        sandbox.begin()
        damage(make_checkpoint(sandbox.run.checkpoints, 5) / name)
        return sandbox.main("checkpoints", str(sandbox.run.path), "--verify")

    return case


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def checkpoint_of_the_future(file: Path) -> None:
    content = json.loads(file.read_text())
    content.pop("sha256")
    content["format"] = 99
    file.write_text(json.dumps({**content, "sha256": sha256_of_json(content)}))


def forged_checkpoint(file: Path) -> None:
    content = json.loads(file.read_text())
    content.pop("sha256")
    content["state"]["skipped"] = ["x"]
    file.write_text(json.dumps({**content, "sha256": sha256_of_json(content)}))


def unreadable(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def lost_checkpoints(sandbox: Sandbox) -> str:
    sandbox.begin()
    sandbox.run.record_save(5)
    return sandbox.train()


def unwritable_checkpoints(sandbox: Sandbox) -> str:
    sandbox.begin()
    sandbox.run.checkpoints.symlink_to("/sys/kernel")
    return refused(sandbox.run.check_writable)


def rank_that_meets(error: Exception, status: int) -> Case:
    """Return the case of rank 3 of 4 that ends with `status` for an error."""

    def case(sandbox: Sandbox) -> str:
        def fail() -> int:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables_of(3, 4, 29500).items():
                patch.setenv(name, value)
            sandbox.capsys.readouterr()
            assert as_rank(fail) == status
        return " ".join(sandbox.capsys.readouterr().err.split()).removeprefix("error: ")

    return case


def no_torchrun(sandbox: Sandbox) -> str:
    sandbox.capsys.readouterr()
    assert train_module.main([str(sandbox.recipe)]) == 2
    return " ".join(sandbox.capsys.readouterr().err.split()).removeprefix("error: ")


def variable(name: str, value: str | None) -> Case:
    """Return the case of a rank with a wrong variable of torchrun; None: it is missing."""

    def case(sandbox: Sandbox) -> str:
        with pytest.MonkeyPatch.context() as patch:
            for known, good in variables_of(0, 2).items():
                patch.setenv(known, good)
            patch.setenv(name, value) if value is not None else patch.delenv(name)
            return no_torchrun(sandbox)

    return case


def taken_port(sandbox: Sandbox) -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionError) as error:
            meet(World(0, 2, 0, 2, "127.0.0.1", port, hosted=False), timedelta(seconds=5))
    return str(error.value).replace(str(port), "29500")


def unknown_localhost(sandbox: Sandbox) -> str:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", unknown)
        return sandbox.train()


def no_sbatch(sandbox: Sandbox) -> str:
    path, os.environ["PATH"] = os.environ["PATH"], ""
    try:
        return sandbox.main(
            "submit", str(sandbox.recipe), f"run_directory={sandbox.run.path}", "slurm.ranks_per_node=4", "--nodes", "1"
        )
    finally:
        os.environ["PATH"] = path


def refused(work: Callable[[], object]) -> str:
    with pytest.raises((ValueError, ArithmeticError, OSError)) as error:
        work()
    return str(error.value)


def unfit_node(sandbox: Sandbox) -> str:
    os.environ["SLURMD_NODENAME"] = "n7"
    settings = [f"run_directory={sandbox.run.path}", "slurm.cpu=true", "slurm.min_free_disk_gb=1e9"]
    said = refused(lambda: check_node(load_recipe(sandbox.recipe, settings), 2))
    del os.environ["SLURMD_NODENAME"]
    return re.sub(r"[\d.]+ GB free", "… GB free", said)


def fruitless(sandbox: Sandbox) -> str:
    recipe = load_recipe(sandbox.recipe, [f"run_directory={sandbox.run.path}", "slurm.max_fruitless_starts=1"])
    return [requeue(recipe).reason for _ in range(3)][-1]


def nonfinite(sandbox: Sandbox) -> str:
    watch = LossWatch(FaultsConfig(max_nonfinite_steps=2))
    return refused(lambda: [watch.judge(step, float("nan"), float("inf")) for step in (7, 8)])


def lost_weights(sandbox: Sandbox) -> str:
    return refused(lambda: LossWatch(FaultsConfig()).judge(7, float("nan"), 1.0))


def spikes(sandbox: Sandbox) -> str:
    watch = LossWatch(FaultsConfig(max_rewinds=0))
    return refused(lambda: watch.rewound(7, 9.5, None))


def hang(sandbox: Sandbox) -> str:
    at = {rank: Position(40, 7, "summing over the ranks") for rank in range(4)}
    return diagnosis({**at, 3: Position(38, 7, "reading micro-batch 0 of bucket 4096")}, 600)


def silence(sandbox: Sandbox) -> str:
    return diagnosis({0: Position(40, 7, "summing over the ranks"), 1: None}, 600)


def plan(*arguments: str) -> Case:
    return lambda sandbox: sandbox.main("plan", str(sandbox.recipe), "parallel.tokens_per_rank=256", *arguments)


def file_without_device(sandbox: Sandbox) -> str:
    file = sandbox.directory / "here.json"
    file.write_text("{}")
    return plan("--gpus", "2", "--device", str(file))(sandbox)


HALF = "train.dtype=bfloat16"

CASES: dict[str, dict[str, Case]] = {
    "Settings": {f"{title}: `{override}`": setting(override) for title, override in SETTINGS.items()},
    "Recipes": {
        "a missing recipe": lambda sandbox: sandbox.main("train", str(sandbox.directory / "none.toml")),
        "a recipe that is not TOML": broken_recipe("steps = = 3"),
        "a recipe that is not text": broken_recipe(b"\xff\xfe\x00"),
        "a recipe that is nested too deeply": broken_recipe("x = " + "[" * 100_000),
        "a recipe of gigabytes": broken_recipe("# comment\n" * 110_000),
        "a recipe without a required key": broken_recipe('run_directory = "runs/a"\n[data]\ndirectory = "d"\n'),
    },
    "Plans": {
        "an unknown device: `longring plan --device h1000`": plan(HALF, "--gpus", "8", "--device", "h1000"),
        "GPUs without a device": plan("--gpus", "8"),
        "a device without a number of GPUs": plan("--device", "h100"),
        "GPUs that do not divide the batch": plan(HALF, "--gpus", "6", "--device", "h100"),
        "a plan of fp32 on a device of bf16": plan("--gpus", "8", "--device", "h100"),
        "a file that is no measured device": file_without_device,
        "a plan of GPUs with --ranks": plan(HALF, "--gpus", "8", "--device", "h100", "--ranks", "4"),
    },
    "World": {
        "too few ranks for the longest sequence": lambda sandbox: sandbox.train(
            "parallel.tokens_per_rank=128", ranks=2
        ),
        "ranks that are not a multiple of the tensor-parallel degree": lambda sandbox: sandbox.train(
            "parallel.tensor=2", ranks=3
        ),
        "a batch smaller than one micro-batch of all ranks": lambda sandbox: sandbox.train(ranks=8),
        "a rank without torchrun": no_torchrun,
        "a rank whose number is none: `RANK=abc`": variable("RANK", "abc"),
        "a rank outside of its world: `RANK=2`": variable("RANK", "2"),
        "a world of no ranks: `WORLD_SIZE=0`": variable("WORLD_SIZE", "0"),
        "a rank without its number on the node": variable("LOCAL_RANK", None),
        "an address that is none: `MASTER_ADDR=tcp://n1`": variable("MASTER_ADDR", "tcp://n1"),
        "another process at the port where ranks meet": taken_port,
        "a machine that does not know `localhost`": unknown_localhost,
        "ranks with other settings": ranks_that_differ,
        "several nodes without a rendezvous": lambda sandbox: sandbox.train("--nodes", "2", ranks=2),
        "a rendezvous without a port": lambda sandbox: sandbox.train(
            *("--nodes", "2", "--rendezvous", "n1", "--job", "7-0", "--address", "n1"), ranks=2
        ),
    },
    "Data": {
        "no prepared data": missing_data,
        "a missing shard": missing_shard,
        "a truncated shard": truncated_shard,
        "one flipped bit in a shard (`longring inspect`)": flipped_shard,
        "a manifest that names a file elsewhere": name_that_leads_elsewhere,
        "a link out of the data": link_out_of_the_data,
        "a truncated manifest": manifest_cut_short,
        "a manifest of a later LongRing": manifest_of_the_future,
        "a changed tokenizer": another_tokenizer,
        "a missing table of shards": missing_table,
        "data prepared with other settings": lambda sandbox: sandbox.train("data.max_bucket_tokens=256"),
        "a share of an unknown source": lambda sandbox: sandbox.train("curriculum.shares={web=1}"),
        "a share of a bucket that is not in use": lambda sandbox: sandbox.train("curriculum.shares.@1024=0.5"),
        "shares that sum to more than 1": lambda sandbox: sandbox.train("curriculum.shares={'@64'=0.7, '@128'=0.4}"),
        "shares that follow the losses of one source": lambda sandbox: sandbox.train("curriculum.renewal.rate=0.1"),
        "shares that contradict each other": lambda sandbox: sandbox.train(
            "curriculum.shares={'@64'=0.5, 'documents@64'=0.4}"
        ),
        "odds for another number of buckets": lambda sandbox: sandbox.train("curriculum.odds=[1,2]"),
        "a second preparation at the same time": second_preparation,
        "a missing source": lambda sandbox: sandbox.main(
            "prepare",
            str(sandbox.recipe),
            f"data.directory={sandbox.directory}/new",
            "data.source.path=/nowhere/*.jsonl",
        ),
        "documents without text": lambda sandbox: prepare_from(sandbox, "a.jsonl", b'{"text": ""}\n'),
        "lines that are not JSON": lambda sandbox: prepare_from(sandbox, "b.jsonl", b"{{{\n" * 5),
        "a truncated compressed file": lambda sandbox: prepare_from(
            sandbox, "c.jsonl.gz", gzip.compress(b'{"text": "words and more words"}\n' * 1000, mtime=0)[:-20]
        ),
        "a data directory with other files": directory_in_the_way,
        "a missing tokenizer": lambda sandbox: sandbox.main(
            "prepare", str(sandbox.recipe), f"data.directory={sandbox.directory}/new", "data.tokenizer.path=/nowhere"
        ),
        "a tokenizer whose pattern does not compile": lambda sandbox: prepare_with_tokenizer(sandbox, split_at("((")),
        "a tokenizer whose pattern backtracks without end": lambda sandbox: prepare_with_tokenizer(
            sandbox, split_at("(a+)+$")
        ),
        "a tokenizer with a huge id": lambda sandbox: prepare_with_tokenizer(
            sandbox, lambda content: content["model"]["vocab"].update(far=4 * 10**9)
        ),
        "a tokenizer that cuts at random": lambda sandbox: prepare_with_tokenizer(
            sandbox, lambda content: content["model"].update(dropout=0.5)
        ),
    },
    "Corpora": CORPORA,
    "Ordering": {
        "ordering of data without its rests": lambda sandbox: sandbox.order(),
        "no order": lambda sandbox: sandbox.order("data.rest=pack", mode="off"),
        "ordering of data that is not prepared": lambda sandbox: sandbox.order(
            "data.rest=pack", f"data.directory={sandbox.directory}/none"
        ),
        "data prepared without its rests": lambda sandbox: sandbox.order("data.rest=pack"),
        "contexts longer than the largest bucket": lambda sandbox: sandbox.order(
            "data.rest=pack", "order.context_tokens=4096"
        ),
        "an unknown stage": lambda sandbox: sandbox.order("data.rest=pack", "--stage", "nowhere"),
        "a malformed part": lambda sandbox: sandbox.order("data.rest=pack", "--part", "3/3"),
        "an unknown order": lambda sandbox: sandbox.order("data.rest=pack", mode="alphabetical"),
    },
    "Runs and checkpoints": {
        "another learning rate after five steps": with_five_steps("train.learning_rate=0.5"),
        "more steps than the steps done allow": with_five_steps("train.steps=40"),
        "another model after five steps": with_five_steps("model.num_layers=3"),
        "a run in an earlier order of batches": with_five_steps("train.steps=20", order=1),
        "a checkpoint of another run": with_five_steps("train.steps=20", run="2" * 32),
        "a run directory with other files": other_files_in_the_run,
        "a second run in the directory of a running one": second_run,
        "a directory without a run": no_run,
        "no checkpoint yet": no_checkpoint,
        "an override of a finished run": setting_of_a_finished_run,
        "a checkpoint of other data": checkpoint_of_other_data,
        "a truncated file of a checkpoint": damaged(lambda file: file.write_bytes(file.read_bytes()[:-1])),
        "one flipped bit in a checkpoint": damaged(flip),
        "a missing file of a checkpoint": damaged(Path.unlink),
        "a truncated manifest of a checkpoint": damaged(
            lambda file: file.write_text(file.read_text()[:100]), "manifest.json"
        ),
        "a changed number in the manifest of a checkpoint": damaged(
            lambda file: file.write_text(file.read_text().replace('"step": 5', '"step": 6')), "manifest.json"
        ),
        "a checkpoint of a later LongRing": damaged(checkpoint_of_the_future, "manifest.json"),
        "a forged manifest of a checkpoint": damaged(forged_checkpoint, "manifest.json"),
        "a file of a checkpoint that cannot be read": damaged(unreadable, "manifest.json"),
        "checkpoints that are gone": lost_checkpoints,
        "checkpoints that cannot be written": unwritable_checkpoints,
    },
    "During training": {
        "too many consecutive non-finite gradients": nonfinite,
        "a loss that is not finite with a finite gradient": lost_weights,
        "too many spikes": spikes,
        "a rank that hangs": hang,
        "a rank that is stopped or gone": silence,
        "too little memory on one rank": rank_that_meets(MemoryError("Unable to allocate 8.00 GiB"), USER_ERROR),
        "an error of a GPU (status 70)": rank_that_meets(
            torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), GPU_ERROR
        ),
        "a rank that is gone, in `longring evaluate`, `plan --measure` or `topology` (status 75)": rank_that_meets(
            RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:5"), GO_ON_LATER
        ),
    },
    "Slurm": {
        "a job whose ranks cannot hold the longest sequence": lambda sandbox: sandbox.main(
            "submit", str(sandbox.recipe), "parallel.tokens_per_rank=128", "slurm.ranks_per_node=3", "--nodes", "1"
        ),
        "no Slurm": no_sbatch,
        "an image that does not exist": lambda sandbox: sandbox.main(
            "submit", str(sandbox.recipe), "--nodes", "1", "--container", "longring.sif"
        ),
        "an unfit node": unfit_node,
        "a job without progress": fruitless,
    },
}
NAMES = [(part, title) for part, cases in CASES.items() for title in cases]


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str], str]]:
    """Messages by part and title; written to the page at the end if LONGRING_WRITE_ERRORS is set."""
    seen: dict[tuple[str, str], str] = {}
    yield seen
    if os.environ.get("LONGRING_WRITE_ERRORS") and len(seen) == len(NAMES):
        DOCUMENT.write_text(page(seen))


def page(seen: dict[tuple[str, str], str]) -> str:
    parts = [HEAD]
    for part, cases in CASES.items():
        parts.append(f"\n## {part}\n\n| mistake or fault | message |\n|---|---|\n")
        parts += [row(title, seen[part, title]) for title in cases]
    return "".join(parts)


def row(title: str, message: str) -> str:
    return f"| {title} | {message.replace('|', BAR)} |\n"


QUICK = ("a text in UTF-16", "token ids with EOS inside", "a stream of ids without EOS", "a .bin without its .idx")
"""Corpora of the quick lane; tests/data/prepare/test_kind_faults.py has most of the others in little time."""


@pytest.mark.parametrize(
    ("part", "title"),
    [
        pytest.param(*name, marks=pytest.mark.full if name[0] == "Corpora" and name[1] not in QUICK else ())
        for name in NAMES
    ],
    ids=lambda value: value,
)
def test_every_mistake_has_the_message_of_the_page(part, title, recipe_file, tmp_path, capsys, table, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    message = CASES[part][title](Sandbox(recipe_file, tmp_path, capsys))
    assert len(message) > 20
    for path in (tmp_path, recipe_file.parent):
        message = message.replace(str(path), "…")
    message = re.sub(r"\b[0-9a-f]{12,}(\.\.\.)?", "…", message)
    message = re.sub(r"(Known here:|must be one of) .*", r"\1 …", message)
    # The documents are Python's library, so the order of the batches follows from its version.
    message = re.sub(r"step \d+ (would have had a batch of bucket) \d+, and had one of \d+", r"step … \1 …", message)
    table[part, title] = message
    if not os.environ.get("LONGRING_WRITE_ERRORS"):
        assert row(title, message) in DOCUMENT.read_text()


def test_the_page_has_every_row_and_no_other():
    assert len(NAMES) >= 60
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == len(NAMES) + len(CASES), "one head for each part"
