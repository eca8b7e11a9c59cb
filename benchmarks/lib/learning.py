"""What experiments on learning share: held-out documents, runs that are evaluated, and the gate of copying."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from longring.data.files import write_text
from longring.data.format.manifest import open_prepared
from longring.data.format.tokenizer import TOKENIZER_FILE
from longring.data.lock import held
from longring.launch.records import read_records
from tokenizers import Tokenizer

from .commands import longring
from .corpus import CORPUS_SIZES, make_corpus, site_packages
from .script import Row, make_parser

GPU_SIZE = "8 layers of 512 and contexts of 16,384 tokens, for one GPU"
"""What an experiment trains with --gpu."""
HELD_OUT = "held_out"
"""Directory of the prepared held-out documents."""
HELD_OUT_SHARE = 0.5
"""Share of the documents of held-out packages that are evaluated: prepared data must have documents to train, too."""
LONGEST_DOCUMENTS = 32
"""Number of held-out documents of the longest length whose loss is measured; of shorter ones, as many tokens or all."""
GATE_GAIN, GATE_RIGHT = 1.0, 0.5
"""A model copies if the second time of a text has a loss this many nats lower, and this share of its tokens is right.

The gain alone could come from knowing which tokens have been read, in whatever order.
"""


def experiment_parser(doc: str, quick: str, picture: str, *, gpu: bool) -> argparse.ArgumentParser:
    """Return the parser of an experiment: the options of every benchmark, and those of its directory and cells.

    `picture` says what --picture draws. With `gpu` there is a size for a GPU, --gpu.
    """
    parser = make_parser(doc, quick)
    if gpu:
        parser.add_argument("--gpu", dest="size", action="store_const", const="gpu", help=GPU_SIZE)
    parser.add_argument("--directory", type=Path, metavar="DIR", help="keep data, runs and results; resume from there")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="corpus that benchmarks/corpus.py has made")
    parser.add_argument("--record", type=Path, metavar="FILE", help="take the cells of a stored record as measured")
    parser.add_argument("--show", action="store_true", help="print the results that are stored, and train nothing")
    parser.add_argument("--picture", type=Path, metavar="FILE", help=picture)
    return parser


def link_corpus(folder: Path, corpus: Path | None, size: str) -> None:
    """Let `folder / "corpus"` be the corpus of benchmarks/corpus.py in a directory; without one, make it here."""
    here = folder / "corpus"
    if corpus is None:
        make_corpus(here, CORPUS_SIZES[size], site_packages())
    elif not here.exists():
        here.symlink_to(corpus.absolute())


def tokenizer_of(folder: Path, prepared: str) -> Tokenizer:
    """Return the tokenizer of prepared data, which encodes the names of special tokens as characters."""
    tokenizer = Tokenizer.from_file(str(folder / prepared / TOKENIZER_FILE))
    tokenizer.encode_special_tokens = True
    return tokenizer


def beginnings(file: Path, tokenizer: Tokenizer, lengths: Sequence[int]) -> Iterator[Row]:
    """Yield the first tokens of documents, as many as the largest of `lengths` that each has.

    Documents that are shorter than all of them are left out.
    """
    with file.open() as lines:
        for line in lines:
            tokens = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            if fitting := [length for length in lengths if length <= len(tokens)]:
                yield {"tokens": tokens[: max(fitting)]}


def prepare_held_out(
    folder: Path, recipe: Path, prepared: str, lengths: Sequence[int], settings: Sequence[str] = ()
) -> None:
    """Prepare the held-out documents, each as one sequence from its start, in a directory `held_out`.

    A document of n tokens is a sequence of the largest of `lengths` that is at most n, so the length of a sequence is
    that of its document within the step between two lengths, and the longest sequences begin longer ones. The recipe's
    limits on documents do not count. The tokenizer is that of the directory `prepared`.
    """
    if (folder / HELD_OUT).exists():
        return
    found = beginnings(folder / "corpus" / "held_out.jsonl", tokenizer_of(folder, prepared), lengths)
    write_text(folder / "held_out.jsonl", "".join(json.dumps(one) + "\n" for one in found))
    longring(
        folder,
        *("prepare", recipe.name, *settings, f"data.directory={HELD_OUT}", "data.source.path=held_out.jsonl"),
        *(
            *("data.source.tokens_field=tokens", "data.source.min_tokens=0", "data.source.max_tokens=0"),
            *(f"data.tokenizer.path={prepared}", "order.mode=off", "order.directory="),
            f"data.held_out_fraction={HELD_OUT_SHARE}",
        ),
        *(
            "data.method=decompose",
            "data.cut=largest_first",
            "data.rest=drop",
            f"data.min_bucket_tokens={min(lengths)}",
        ),
        f"data.max_bucket_tokens={max(lengths)}",
    )


def sequences_of(prepared: Path) -> dict[str, Row]:
    """Return for each length of prepared data its share of the tokens, and of its sequences those of one document."""
    manifest = open_prepared(prepared)
    buckets = manifest.buckets("train")
    tokens = sum(bucket.length * bucket.sequences for bucket in buckets)
    found = {}
    for bucket in buckets:
        pieces = manifest.reader(bucket).pieces(range(bucket.sequences))
        found[str(bucket.length)] = {
            "of_tokens": bucket.length * bucket.sequences / tokens,
            "of_one_document": mean(len(one) == 1 for one in pieces),
        }
    return found


def train(folder: Path, recipe: Path, run: str, *settings: str) -> Path:
    """Train a run on one rank, or what is left of it, and return its directory."""
    longring(folder, "train", recipe.name, *settings, f"run_directory={run}", "--ranks", "1")
    return folder / run


def train_shared(folder: Path, recipe: Path, run: str, *settings: str) -> Path:
    """Train a run that several cells begin with; wait if another process trains it."""
    with held(folder / f"{Path(run).name}.lock", wait_s=10**6):
        return train(folder, recipe, run, *settings)


def evaluate(folder: Path, checkpoints: Sequence[Path], tasks: Sequence[str], *settings: str) -> list[Row]:
    """Return `longring evaluate` of checkpoints on the held-out documents, on one rank.

    The last checkpoint is of a run that no other process evaluates.
    """
    file = checkpoints[-1].parents[1] / "found.json"
    longring(
        folder,
        *("evaluate", *(str(one) for one in checkpoints), "--data", HELD_OUT, "--ranks", "1", *settings),
        *(["--tasks", ",".join(tasks)] if tasks else []),
        *("--json", str(file)),
    )
    return json.loads(file.read_text())["targets"] if len(checkpoints) > 1 else [json.loads(file.read_text())]


def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoints of a run, the earliest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def keep_last_checkpoint(run: Path) -> None:
    """Delete all checkpoints of a run but the last one."""
    for checkpoint in checkpoints_of(run)[:-1]:
        shutil.rmtree(checkpoint)


def shown(target: Mapping[str, Any]) -> Row:
    """Return what the results of an evaluation keep of a target: losses by length and position, and scores of tasks."""
    keys = ("exact", "tokens", "loss", "gain", "by_depth")
    return {
        "step": target["step"],
        "loss": target["loss"],
        "buckets": [
            {
                "length": bucket["bucket"],
                "tokens": bucket["tokens"],
                "loss": bucket["loss"],
                "by_position": [[part["to"], part["loss"], part["tokens"]] for part in bucket["by_position"]],
            }
            for bucket in target["buckets"]
        ],
        "tasks": [
            {"task": task["task"], "length": task["length"], **{key: task[key] for key in keys}}
            for task in target.get("tasks", [])
        ],
    }


def copying(row: Mapping[str, Any], length: int, task: str = "copy_text") -> tuple[float, float]:
    """Return the gain of copying, nats, and the share of tokens that is right, of sequences of a length."""
    [found] = [one for one in row["tasks"] if (one["task"], one["length"]) == (task, length)]
    return found["gain"], found["tokens"]


def right_tokens(row: Mapping[str, Any], task: str, length: int) -> float:
    """Return the share of right tokens of the tasks whose names begin with `task`, mean over them, at a length.

    A model that copies with errors has few answers that are right as a whole, or none.
    """
    found = [one["tokens"] for one in row["tasks"] if one["task"].startswith(task) and one["length"] == length]
    return mean(found) if found else 0.0


def copies(row: Mapping[str, Any], length: int) -> bool:
    """Return whether a model passes the gate: it copies text in sequences of a length."""
    gain, right = copying(row, length)
    return gain > GATE_GAIN and right >= GATE_RIGHT


def steps_by_bucket(run: Path) -> list[tuple[int, int]]:
    """Return the step and the length of each step of a run, in order."""
    return [(row["step"], row["bucket"]) for row in read_records(run / "metrics.jsonl")]


def spread(values: Sequence[float]) -> tuple[float, float | None] | None:
    """Return the mean and the standard deviation of values; no deviation of one value, nothing of none."""
    return (mean(values), stdev(values) if len(values) > 1 else None) if values else None


def spread_text(found: Sequence[float | None] | None, form: str) -> str:
    """Return "mean ±deviation" of a spread, both in the form of one number; "" of none."""
    return " ±".join(form.format(value) for value in found or () if value is not None)
