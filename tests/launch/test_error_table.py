"""docs/errors.md: what can be wrong, and what LongRing says of it. The table is what these tests see.

LONGRING_WRITE_ERRORS=1 pytest tests/launch/test_error_table.py        writes it anew
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.small_checkpoint import make
from longring.data.files import sha256_of_json
from longring.launch import cli, run_directory
from longring.launch import train as train_module
from longring.launch.commands.submit import requeue
from longring.launch.config import FaultsConfig, load_recipe
from longring.launch.loss_watch import LossWatch
from longring.launch.ranks.node import check_node
from longring.launch.ranks.watchdog import Position, diagnosis
from longring.launch.run_directory import RunDirectory

DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"
BAR = "\\|"
HEAD = """# Errors

What can be wrong, and what LongRing says of it, on standard error after `error: `. Each row is what a test sees
(`tests/launch/test_error_table.py`, which also writes this page); paths and hashes are shortened to `…`. The status
is 2 for what only a person can put right; [faults.md](faults.md) has the others.
"""


class Bench:
    """A recipe, its data and a run directory, all of which a case may break; `error` gives the one message."""

    def __init__(self, recipe_file: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.recipe = directory / "recipe.toml"
        self.recipe.write_text(recipe_file.read_text())
        self.directory = directory
        self.run = RunDirectory(directory / "run")
        self._source = recipe_file.parent / "data"
        self._capsys = capsys

    @property
    def data(self) -> Path:
        """A copy of the prepared data; the recipe names it from now on."""
        copy = self.directory / "data"
        if not copy.exists():
            shutil.copytree(self._source, copy)
            self.recipe.write_text(self.recipe.read_text().replace(str(self._source), str(copy)))
        return copy

    def main(self, *words: str) -> str:
        self._capsys.readouterr()
        status = cli.main(list(words))
        said = self._capsys.readouterr()
        assert status in (1, 2), said
        assert "Traceback" not in said.err
        text = said.err if status == 2 else said.out[said.out.index("damaged:") :]
        return re.sub(r"^(error|damaged): ", "", " ".join(text.split()))

    def train(self, *overrides: str, ranks: int = 4) -> str:
        run = f"run_directory={self.run.path}"
        return self.main("train", str(self.recipe), run, *overrides, "--ranks", str(ranks))

    def order(self, *words: str, mode: str = "in_context") -> str:
        settings = [f"order.mode={mode}", f"order.directory={self.directory}/ordered"]
        return self.main("order", str(self.recipe), *settings, *words)

    def begun(self) -> None:
        self.run.create(load_recipe(self.recipe, [f"run_directory={self.run.path}"]))


Case = Callable[[Bench], str]
SETTINGS: dict[str, str] = {
    "a key that is none": "train.stepz=1",
    "a table that is none": "trian.steps=1",
    "a number with a fraction for a count": "train.steps=2.5",
    "true for a number": "train.steps=true",
    "a word for a number": "train.learning_rate=fast",
    "a number for a table": "train=3",
    "no `=` in a setting": "train.steps",
    "a table below a value": "train.steps.more=1",
    "a dtype that is none": "train.dtype=float16",
    "no steps": "train.steps=0",
    "a batch of no tokens": "train.global_batch_tokens=0",
    "a batch that is no multiple of the longest sequence": "train.global_batch_tokens=3000",
    "warm-up longer than the run": "train.warmup_steps=5000",
    "a minimum above the peak": "train.min_learning_rate=1.0",
    "a negative limit of the gradient": "train.clip_grad_norm=-1.0",
    "no checkpoint to keep": "train.keep_checkpoints=0",
    "an attention backend that is none": "train.attention_backend=cuda",
    "a spike's window of one step": "faults.spike_window_steps=1",
    "a watchdog that looks back": "faults.hang_minutes=-1.0",
    "no try for a save": "faults.max_failed_saves=0",
    "not one non-finite step borne": "faults.max_nonfinite_steps=0",
    "a time that is none": "slurm.time=tomorrow",
    "a space in an option of sbatch": "slurm.partition='gpu --wrap=x'",
    "an option that sbatch cannot have": "slurm.options={'a b'='1'}",
    "no ranks on a node": "slurm.ranks_per_node=0",
    "tokens of a rank that are no power of two": "parallel.tokens_per_rank=500",
    "a ZeRO stage that is none": "parallel.zero_stage=4",
    "tensor parallelism that divides no heads": "parallel.tensor=3",
    "tensor parallelism that divides no kv heads": "parallel.tensor=4",
    "sequence parallelism alone": "parallel.sequence_parallel=true",
    "heads that do not divide the width": "model.num_heads=7",
    "kv heads that do not divide the heads": "model.num_kv_heads=3",
    "no layers": "model.num_layers=0",
    "a bucket that is no power of two": "data.max_bucket_tokens=3000",
    "buckets the wrong way round": "data.min_bucket_tokens=1024",
    "all documents held out": "data.held_out_fraction=1.0",
    "a fraction above one": "data.max_bad_fraction=1.5",
    "a vocabulary below the bytes": "data.tokenizer.vocab_size=100",
    "no boundary token": "data.tokenizer.boundary=''",
    "a kind of source that is none": "data.source.kind=csv",
    "no directory for the data": "data.directory=''",
    "a password in an address": "data.source.path=s3://me:secret@host/a",
    "no cycle": "curriculum.cycles=0",
    "odds that are none": "curriculum.odds=grow",
    "odds below zero": "curriculum.odds=[1,-2]",
    "a weight of nothing": "curriculum.weights={web=0}",
    "no worker to read ahead": "loader.prefetch_batches=0",
    "an evaluation of nothing": "evaluate.max_tokens_per_bucket=0",
}


def setting(override: str) -> Case:
    return lambda bench: bench.train(override)


def broken_recipe(text: str | bytes) -> Case:
    def case(bench: Bench) -> str:
        bench.recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
        return bench.train()

    return case


def missing_data(bench: Bench) -> str:
    return bench.train(f"data.directory={bench.directory}/nowhere")


def missing_shard(bench: Bench) -> str:
    min(bench.data.rglob("train*.tar")).unlink()
    return bench.train()


def truncated_shard(bench: Bench) -> str:
    shard = min(bench.data.rglob("train*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    return bench.train()


def flipped_shard(bench: Bench) -> str:
    shard = min(bench.data.rglob("train*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    return bench.main("inspect", str(bench.data))


def manifest_cut_short(bench: Bench) -> str:
    file = bench.data / "manifest.json"
    file.write_text(file.read_text()[:200])
    return bench.train()


def manifest_of_the_future(bench: Bench) -> str:
    file = bench.data / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    return bench.train()


def another_tokenizer(bench: Bench) -> str:
    file = bench.data / "tokenizer.json"
    file.write_text(file.read_text().replace("Ġ", "Ġ ", 1))
    return bench.train()


def missing_table(bench: Bench) -> str:
    (bench.data / "shards.npy").unlink()
    return bench.train()


def prepare_from(bench: Bench, name: str, content: bytes) -> str:
    (bench.directory / name).write_bytes(content)
    settings = [f"data.directory={bench.directory}/new", f"data.source.path={bench.directory}/{name}"]
    return bench.main("prepare", str(bench.recipe), *settings)


def directory_in_the_way(bench: Bench) -> str:
    (bench.directory / "thesis").mkdir()
    (bench.directory / "thesis" / "chapter.tex").write_text("...")
    return bench.main("prepare", str(bench.recipe), f"data.directory={bench.directory}/thesis")


def another_recipe(bench: Bench) -> str:
    bench.begun()
    return bench.train("train.learning_rate=0.5")


def other_files_in_the_run(bench: Bench) -> str:
    bench.run.path.mkdir()
    (bench.run.path / "chapter.tex").write_text("...")
    return bench.train()


def second_run(bench: Bench) -> str:
    with pytest.MonkeyPatch.context() as patch, bench.run.held():
        patch.setattr(run_directory, "_LOCK_WAIT_S", 0)
        with pytest.raises(ValueError, match="is being trained in") as error:
            bench.run.held().__enter__()
    return re.sub(r"process \d+ on \S+ since \S+:", "process … on … since …:", str(error.value))


def no_run(bench: Bench) -> str:
    return bench.main("evaluate", str(bench.directory))


def no_checkpoint(bench: Bench) -> str:
    bench.begun()
    return bench.main("evaluate", str(bench.run.path))


def setting_of_a_finished_run(bench: Bench) -> str:
    bench.begun()
    return bench.main("evaluate", str(bench.run.path), "train.steps=1")


def checkpoint_of_other_data(bench: Bench) -> str:
    bench.begun()
    make(bench.run.checkpoints, 5)
    return bench.train()


def damaged(damage: Callable[[Path], object], name: str = "rank-00001.safetensors") -> Case:
    def case(bench: Bench) -> str:
        bench.begun()
        damage(make(bench.run.checkpoints, 5) / name)
        return bench.main("checkpoints", str(bench.run.path), "--verify")

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


def no_torchrun(bench: Bench) -> str:
    bench._capsys.readouterr()
    assert train_module.main([str(bench.recipe)]) == 2
    return " ".join(bench._capsys.readouterr().err.split()).removeprefix("error: ")


def no_sbatch(bench: Bench) -> str:
    path, os.environ["PATH"] = os.environ["PATH"], ""
    try:
        return bench.main(
            "submit", str(bench.recipe), f"run_directory={bench.run.path}", "slurm.ranks_per_node=4", "--nodes", "1"
        )
    finally:
        os.environ["PATH"] = path


def refused(work: Callable[[], object]) -> str:
    with pytest.raises((ValueError, ArithmeticError)) as error:
        work()
    return str(error.value)


def unfit_node(bench: Bench) -> str:
    os.environ["SLURMD_NODENAME"] = "n7"
    settings = [f"run_directory={bench.run.path}", "slurm.cpu=true", "slurm.min_free_disk_gb=1e9"]
    said = refused(lambda: check_node(load_recipe(bench.recipe, settings), 2))
    del os.environ["SLURMD_NODENAME"]
    return re.sub(r"[\d.]+ GB free", "… GB free", said)


def fruitless(bench: Bench) -> str:
    recipe = load_recipe(bench.recipe, [f"run_directory={bench.run.path}", "slurm.max_fruitless_starts=1"])
    return [requeue(recipe).why for _ in range(3)][-1]


def nonfinite(bench: Bench) -> str:
    watch = LossWatch(FaultsConfig(max_nonfinite_steps=2))
    return refused(lambda: [watch.judge(step, float("nan"), float("inf")) for step in (7, 8)])


def lost_weights(bench: Bench) -> str:
    return refused(lambda: LossWatch(FaultsConfig()).judge(7, float("nan"), 1.0))


def spikes(bench: Bench) -> str:
    watch = LossWatch(FaultsConfig(max_rewinds=0))
    return refused(lambda: watch.rewound(7, 9.5, None))


def hang(bench: Bench) -> str:
    at = {rank: Position(40, 7, "agreeing with the other ranks") for rank in range(4)}
    return diagnosis({**at, 3: Position(38, 7, "reading micro-batch 0 of bucket 4096")}, 600)


def silence(bench: Bench) -> str:
    return diagnosis({0: Position(40, 7, "agreeing with the other ranks"), 1: None}, 600)


CASES: dict[str, dict[str, Case]] = {
    "Settings": {f"{title}: `{override}`": setting(override) for title, override in SETTINGS.items()},
    "Recipes": {
        "a recipe that is not there": lambda bench: bench.main("train", str(bench.directory / "none.toml")),
        "a recipe that is no TOML": broken_recipe("steps = = 3"),
        "a recipe that is no text": broken_recipe(b"\xff\xfe\x00"),
        "a recipe without a needed key": broken_recipe('run_directory = "runs/a"\n[data]\ndirectory = "d"\n'),
    },
    "World": {
        "too few ranks for the longest sequence": lambda bench: bench.train("parallel.tokens_per_rank=128", ranks=2),
        "ranks that tensor parallelism does not divide": lambda bench: bench.train("parallel.tensor=2", ranks=3),
        "a batch that the ranks do not divide": lambda bench: bench.train(ranks=8),
        "a rank without torchrun": no_torchrun,
        "several nodes without a place to meet": lambda bench: bench.train("--nodes", "2", ranks=2),
    },
    "Data": {
        "no prepared data": missing_data,
        "a shard that is not there": missing_shard,
        "a shard cut short": truncated_shard,
        "one wrong bit in a shard (`longring inspect`)": flipped_shard,
        "a manifest cut short": manifest_cut_short,
        "a manifest of a later LongRing": manifest_of_the_future,
        "another tokenizer in the place of the old one": another_tokenizer,
        "no table of shards": missing_table,
        "data prepared otherwise": lambda bench: bench.train("data.max_bucket_tokens=256"),
        "weights of a source that has no data": lambda bench: bench.train("curriculum.weights={web=1}"),
        "odds for another number of buckets": lambda bench: bench.train("curriculum.odds=[1,2]"),
        "a source that is not there": lambda bench: bench.main(
            "prepare", str(bench.recipe), f"data.directory={bench.directory}/new", "data.source.path=/nowhere/*.jsonl"
        ),
        "documents without text": lambda bench: prepare_from(bench, "a.jsonl", b'{"text": ""}\n'),
        "lines that are no JSON": lambda bench: prepare_from(bench, "b.jsonl", b"{{{\n" * 5),
        "a compressed file cut short": lambda bench: prepare_from(
            bench, "c.jsonl.gz", gzip.compress(b'{"text": "words and more words"}\n' * 1000, mtime=0)[:-20]
        ),
        "a directory with other files": directory_in_the_way,
        "a tokenizer that is not there": lambda bench: bench.main(
            "prepare", str(bench.recipe), f"data.directory={bench.directory}/new", "data.tokenizer.path=/nowhere"
        ),
    },
    "Ordering": {
        "an order of data that lost its rests": lambda bench: bench.order(),
        "nothing to order by": lambda bench: bench.order("data.rest=pack", mode="off"),
        "data that is not prepared": lambda bench: bench.order(
            "data.rest=pack", f"data.directory={bench.directory}/none"
        ),
        "data prepared with other rests": lambda bench: bench.order("data.rest=pack"),
        "contexts longer than the largest bucket": lambda bench: bench.order(
            "data.rest=pack", "order.context_tokens=4096"
        ),
        "a stage that is none": lambda bench: bench.order("data.rest=pack", "--stage", "nowhere"),
        "a part that is none": lambda bench: bench.order("data.rest=pack", "--part", "3/3"),
        "an order that is none": lambda bench: bench.order("data.rest=pack", mode="alphabetical"),
    },
    "Runs and checkpoints": {
        "the run of another recipe": another_recipe,
        "a run directory with other files": other_files_in_the_run,
        "a second run in the directory of one that goes on": second_run,
        "no run": no_run,
        "no checkpoint yet": no_checkpoint,
        "a setting of a finished run": setting_of_a_finished_run,
        "a checkpoint of other data": checkpoint_of_other_data,
        "a checkpoint's file cut short": damaged(lambda file: file.write_bytes(file.read_bytes()[:-1])),
        "one wrong bit in a checkpoint": damaged(flip),
        "a checkpoint's file gone": damaged(Path.unlink),
        "a checkpoint's manifest cut short": damaged(
            lambda file: file.write_text(file.read_text()[:100]), "manifest.json"
        ),
        "a changed number in a checkpoint's manifest": damaged(
            lambda file: file.write_text(file.read_text().replace('"step": 5', '"step": 6')), "manifest.json"
        ),
        "a checkpoint of a later LongRing": damaged(checkpoint_of_the_future, "manifest.json"),
    },
    "While it trains": {
        "gradients that are not finite, again and again": nonfinite,
        "a loss that is not finite with gradients that are": lost_weights,
        "spike after spike": spikes,
        "a rank that hangs": hang,
        "a rank that is stopped, or gone": silence,
    },
    "Slurm": {
        "a job larger than its nodes": lambda bench: bench.main(
            "submit", str(bench.recipe), "parallel.tokens_per_rank=128", "slurm.ranks_per_node=3", "--nodes", "1"
        ),
        "no Slurm": no_sbatch,
        "a node that is not fit": unfit_node,
        "a job that does not get on": fruitless,
    },
}
NAMES = [(part, title) for part, cases in CASES.items() for title in cases]


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str], str]]:
    """Messages seen; written to the page when that is asked for and all have been seen."""
    seen: dict[tuple[str, str], str] = {}
    yield seen
    if os.environ.get("LONGRING_WRITE_ERRORS") and len(seen) == len(NAMES):
        DOCUMENT.write_text(page(seen))


def page(seen: dict[tuple[str, str], str]) -> str:
    parts = [HEAD]
    for part, cases in CASES.items():
        parts.append(f"\n## {part}\n\n| what is wrong | message |\n|---|---|\n")
        parts += [row(title, seen[part, title]) for title in cases]
    return "".join(parts)


def row(title: str, message: str) -> str:
    return f"| {title} | {message.replace('|', BAR)} |\n"


@pytest.mark.parametrize(("part", "title"), NAMES, ids=lambda value: value)
def test_every_wrong_thing_gets_the_message_of_the_page(part, title, recipe_file, tmp_path, capsys, table, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    message = CASES[part][title](Bench(recipe_file, tmp_path, capsys))
    assert len(message) > 20
    for path in (tmp_path, recipe_file.parent):
        message = message.replace(str(path), "…")
    message = re.sub(r"\b[0-9a-f]{12,}(\.\.\.)?", "…", message)
    message = re.sub(r"(Known here|must be one of):? .*", r"\1 …", message)
    table[part, title] = message
    if not os.environ.get("LONGRING_WRITE_ERRORS"):
        assert row(title, message) in DOCUMENT.read_text()


def test_the_page_has_every_row_and_no_other():
    assert len(NAMES) >= 60
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == len(NAMES) + len(CASES), "a head for each part"
