"""`longring order` as a whole: every token is where the ledger says, for any division of tasks and after any kill."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.died import Died, die_after
from helpers.files import tree
from helpers.lanes import by_lane
from longring.data.config import DataConfig, LoaderConfig, SourceConfig, TokenizerConfig
from longring.data.curriculum_config import CurriculumConfig
from longring.data.files import sha256_of
from longring.data.format.document import NO_DOCUMENT, SPLITS
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.format.shards import BucketWriter
from longring.data.inspect.cost import PAPER_1B
from longring.data.inspect.inspect import inspect
from longring.data.order import path, stages
from longring.data.order.documents import Documents
from longring.data.order.stages import STAGES, order
from longring.data.order.work_directory import WorkDirectory
from longring.data.order_config import KnotsConfig, OrderConfig
from longring.data.prepare.prepare import prepare
from longring.data.read.knots import Knots
from longring.data.read.loader import read_rows
from longring.data.read.mix import training_order
from rich.console import Console

QUIET = Console(quiet=True)
TOPICS = ("ring token home turn", "bucket shard tar block", "knot label trace head tail", "path graph walk edge degree")

CHILD = """
import json, sys
from rich.console import Console
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.order_config import OrderConfig
from longring.data.order.stages import order
tree, settings = json.loads(sys.argv[1])
tree["source"], tree["tokenizer"] = SourceConfig(**tree["source"]), TokenizerConfig(**tree["tokenizer"])
if __name__ == "__main__":
    order(DataConfig(**tree), OrderConfig(**settings), Console(quiet=True), workers=2)
"""


def sentences(topic: int, seed: int, count: int) -> str:
    generator = random.Random(f"{topic} {seed}")
    words = TOPICS[topic].split()
    return " ".join(generator.choice([*words, *words, f"w{generator.randint(0, 30)}"]) for _ in range(count))


COPIED = {5: 8, 20: 24, 33: 36}
"""Planted near-duplicates: from the copy to its original."""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Return documents of four topics in turn: some long, some planted near-duplicates, two bad ones."""
    found = [sentences(number % 4, number, 10 + 7 * (number % 13) + 150 * (number % 11 == 0)) for number in range(90)]
    for number, (source, copy) in enumerate(COPIED.items()):
        found[source] = sentences(source % 4, 1_000 + number, 80)
        found[copy] = found[source] + " and an end of its own"
    return [*found[:40], "", *found[40:], ""]


@pytest.fixture(scope="module")
def prepared(texts: list[str], tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> DataConfig:
    """Return the settings of prepared data with five input shards and two splits, nothing dropped."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "corpus").mkdir()
    for part in range(5):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[part::5]]
        (folder / "corpus" / f"{part}.jsonl").write_text("".join(lines))
    config = DataConfig(
        directory=str(folder / "data"),
        source=SourceConfig(kind="json", path=str(folder / "corpus")),
        tokenizer=TokenizerConfig(path=str(tokenizer_file)),
        min_bucket_tokens=16,
        max_bucket_tokens=128,
        held_out_fraction=0.2,
        max_bad_fraction=1.0,
        input_shard_bytes=1,
        shard_tokens=1024,
        rest="pack",
    )
    prepare(config, QUIET)
    return config


def settings(folder: Path, **others: Any) -> OrderConfig:
    defaults: dict[str, Any] = {
        "mode": "in_context",
        "directory": str(folder / "ordered"),
        "work_directory": str(folder / "work"),
        "embedding_dimensions": 16,
        "neighbors": 6,
        "seed": 3,
    }
    return OrderConfig(**{**defaults, **others})


def streams(data: DataConfig) -> dict[int, list[int]]:
    """Return the tokens of every document by its record's index, read from the sources, not from prepared data."""
    manifest = open_prepared(data.directory)
    tokenizer = manifest.tokenizer().tokenizer
    found, first = {}, 0
    for entry in manifest.inputs():
        lines = [line for file in entry["files"] for line in Path(file).read_text().splitlines()]
        for record, line in enumerate(lines):
            if text := json.loads(line)["text"]:
                found[first + record] = [0, *tokenizer.encode(text).ids, 0]
        first += entry["records"]
    return found


def check_ordered(manifest: Manifest, data: DataConfig, config: OrderConfig) -> None:
    """Every target comes once, or its document is dropped and counted, in shards, ledger and placement alike."""
    prepared = open_prepared(data.directory)
    documents = streams(data)
    covered: dict[int, Counter[int]] = {record: Counter() for record in documents}
    split_of, begins = {}, {}
    filler: Counter[str] = Counter()
    targets: Counter[int] = Counter()
    several = 0
    for split in SPLITS:
        for bucket in manifest.buckets(split):
            reader = manifest.reader(bucket)
            rows, origins = reader.read(range(bucket.sequences)), reader.pieces(range(bucket.sequences))
            for number, (row, pieces) in enumerate(zip(rows.tolist(), origins, strict=True)):
                targets.update(row[1:] if split == "train" else ())
                several += np.count_nonzero(pieces[:, 1] != NO_DOCUMENT) > 1
                ends = [*pieces[1:, 3].tolist(), bucket.length]
                for (_, record, offset, position), end in zip(pieces.tolist(), ends, strict=True):
                    if record == NO_DOCUMENT:
                        assert set(row[position : end + 1]) == {0}
                        filler[split] += end - position
                        continue
                    assert row[position + 1 : end + 1] == documents[record][offset + 1 : offset + end - position + 1]
                    covered[record].update(range(offset, offset + end - position))
                    assert split_of.setdefault(record, split) == split
                    if offset == 0:
                        begins[record] = (bucket.length, number)
    placement = np.load(Path(config.directory, "placement.npy"))
    assert placement["record"].tolist() == sorted(documents)
    gone: Counter[str] = Counter()
    for record, length, sequence in placement.tolist():
        if length:
            assert sorted(covered[record].elements()) == list(range(len(documents[record]) - 1))
            assert begins[record] == (length, sequence)
        else:
            assert not covered[record]
            assert covered[sequence], "the near-duplicate stays"
            gone[split_of[sequence]] += len(documents[record]) - 1
    for split, books in manifest.ledger.splits.items():
        before = prepared.ledger.splits[split]
        assert (books.documents, books.tokens) == (before.documents, before.tokens)
        assert books.filler_tokens == filler[split] < len(manifest.sources) * config.lengths(data)[0]
        assert books.dropped_tokens["near_duplicate"] == gone[split] == books.dropped_tokens.total()
        assert books.sequence_tokens() == before.tokens - gone[split] + filler[split]
    assert sum(books.packed_sequences for books in manifest.ledger.splits.values()) == several
    manifest.ledger.check()
    assert [targets[token] for token in range(manifest.vocab_size)] == manifest.unigram().tolist()
    assert manifest.lengths == config.lengths(data)
    list(manifest.verify())


CHOICES: list[dict[str, Any]] = [
    {},
    {"by": "random"},
    {"by": "knn", "document_masks": True},
    {"context_tokens": 64, "duplicate_overlap": 0.0, "long_documents": "head", "window_tokens": 20},
    {"mode": "fill_long_buckets"},
    {"mode": "fill_long_buckets", "long_tokens": 16, "document_masks": True, "by": "random"},
    {"mode": "fill_long_buckets", "long_tokens": 128, "window_tokens": 20},
]


@pytest.mark.parametrize("choice", by_lane(CHOICES, quick=[CHOICES[0], CHOICES[5]]), ids=str)
def test_every_token_is_where_the_ledger_says(prepared: DataConfig, tmp_path: Path, choice: dict[str, Any]):
    config = settings(tmp_path, **choice)
    manifest = order(prepared, config, QUIET, workers=1)
    assert manifest is not None
    check_ordered(manifest, prepared, config)
    assert manifest.has_boundaries == config.document_masks
    assert len(manifest.shards) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ordered", "work"]
    # Training reads ordered data like any prepared data.
    found = training_order(manifest, CurriculumConfig(), LoaderConfig(), steps=3, global_batch_tokens=256, seed=0)
    assert set(found.lengths) == set(config.lengths(prepared))


@pytest.mark.parametrize("mode", by_lane(["in_context", "fill_long_buckets"], quick=[], slow=["fill_long_buckets"]))
def test_any_number_of_workers_makes_the_same_bytes(prepared: DataConfig, tmp_path: Path, mode: str):
    reference = settings(tmp_path / "one", mode=mode)
    order(prepared, reference, QUIET, workers=1)
    for workers in (2, 3):
        config = settings(tmp_path / f"{workers}", mode=mode)
        order(prepared, config, QUIET, workers=workers)
        assert tree(config.directory) == tree(reference.directory)
        assert tree(config.work_directory).keys() == tree(reference.work_directory).keys()


@pytest.mark.full
def test_stages_alone_and_in_parts_make_the_same_bytes(prepared: DataConfig, tmp_path: Path):
    """Parts of a stage, done in any order as by the jobs of an array, give the same bytes."""
    reference, config = settings(tmp_path / "one"), settings(tmp_path / "parts")
    order(prepared, reference, QUIET, workers=1)
    advice = "run --stage documents first"
    with pytest.raises(
        ValueError, match=rf"--stage search: stage documents comes before it and lacks 5 of 5 tasks; {advice}"
    ):
        order(prepared, config, QUIET, only="search")
    for stage in STAGES:
        for part in (2, 0, 1):
            assert (
                order(prepared, config, QUIET, workers=1, only=stage.name, part=(part, 3)) is None
                or stage.name == "finish"
            )
    assert tree(config.directory) == tree(reference.directory)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_point_and_continued_gives_the_same_bytes(prepared: DataConfig, tmp_path: Path, seed: int):
    reference, config = settings(tmp_path / "one"), settings(tmp_path / "killed")
    order(prepared, reference, QUIET, workers=1)
    (tmp_path / "child.py").write_text(CHILD)
    arguments = json.dumps([asdict(prepared), asdict(config)])
    command = [sys.executable, "-P", str(tmp_path / "child.py"), arguments]
    choose = random.Random(seed)
    whole = len(tree(tmp_path / "one" / "work"))
    # Kill the process while it starts, then shortly after each of three random numbers of files exists.
    for target in [0, *sorted(choose.sample(range(2, whole), 3))]:
        child = subprocess.Popen(command, start_new_session=True)
        while len(list((tmp_path / "killed").rglob("*.npy"))) < target and not Path(config.directory).exists():
            assert child.poll() is None
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.02) if target else 0.3)
        os.killpg(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    subprocess.run(command, check=True)
    assert tree(config.directory) == tree(reference.directory)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["ordered", "work"]


@pytest.mark.full
def test_stopped_before_any_rename_and_continued(prepared: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run stopped before any rename or removal, the only steps that others see, goes on to the same bytes."""
    reference, config = settings(tmp_path / "one"), settings(tmp_path / "stopped")
    order(prepared, reference, QUIET, workers=1)
    stops = 0
    while not Path(config.directory).exists():
        assert stops < 300
        with monkeypatch.context() as patch, suppress(Died):
            die_after(stops % 10, patch)  # further each time, so that in the end every task is done
            order(prepared, config, QUIET, workers=1)
        stops += 1
    assert stops > 20
    assert tree(config.directory) == tree(reference.directory)


def test_planted_near_duplicates_are_dropped(prepared: DataConfig, texts: list[str], tmp_path: Path):
    config = settings(tmp_path)
    manifest = order(prepared, config, QUIET, workers=1)
    assert manifest is not None
    # Records are numbered file by file.
    numbers = [number for part in range(5) for number in range(part, len(texts), 5)]
    placement = np.load(Path(config.directory, "placement.npy"))
    gone = {numbers[record]: numbers[kept] for record, length, kept in placement.tolist() if not length}
    directory = WorkDirectory(prepared, config, sha256_of(Path(prepared.directory, "manifest.json")))
    held_out = {
        numbers[record]: bool(split)
        for record, split in zip(
            placement["record"].tolist(), directory.documents().column("held_out").tolist(), strict=True
        )
    }
    planted = {frozenset((a, b)) for a, b in COPIED.items() if held_out[a] == held_out[b]}
    assert len(planted) >= 2, "some pairs lie within one split"
    assert {frozenset(pair) for pair in gone.items()} == planted
    books = manifest.ledger.splits
    assert sum(one.dropped_documents["near_duplicate"] for one in books.values()) == len(planted)
    report = json.loads(Path(config.directory, "order.json").read_text())["duplicates"]
    assert 0.8 < report["threshold"] < 1
    kept = order(prepared, settings(tmp_path / "kept", duplicate_overlap=0.0), QUIET, workers=1)
    assert kept is not None
    assert not any(one.dropped_tokens for one in kept.ledger.splits.values())


def test_documents_of_one_topic_come_together(prepared: DataConfig, texts: list[str], tmp_path: Path):
    """Contexts along the path share more topics, which the method does not know, than random order and kNN groups."""
    numbers = [number for part in range(5) for number in range(part, len(texts), 5)]
    same: dict[str, float] = {}
    reports: dict[str, Any] = {}
    for by in ("path", "knn", "random"):
        config = settings(tmp_path / by, by=by, work_directory=str(tmp_path / "work"))
        manifest = order(prepared, config, QUIET, workers=1)
        assert manifest is not None
        pairs = [
            (numbers[one], numbers[other])
            for bucket in manifest.buckets("train")
            for pieces in manifest.reader(bucket).pieces(range(bucket.sequences))
            for one, other in zip(pieces[:-1, 1], pieces[1:, 1], strict=True)
            if other != NO_DOCUMENT
        ]
        topics = [number - (number > 40) for number in range(len(texts))]
        same[by] = float(np.mean([topics[one] % 4 == topics[other] % 4 for one, other in pairs]))
        reports[by] = json.loads(Path(config.directory, "order.json").read_text())
    assert same["path"] > 0.85
    assert same["random"] < 0.5
    assert reports["path"]["contexts"]["inside"] > reports["random"]["contexts"]["inside"] + 0.2
    assert reports["path"]["contexts"]["inside"] > reports["path"]["contexts"]["across"] + 0.2
    assert reports["path"]["path"]["mean_similarity"] >= reports["knn"]["path"]["mean_similarity"]
    assert (
        sum(reports["path"]["path"]["steps"]) + reports["path"]["path"]["jumps"] == reports["path"]["path"]["documents"]
    )


def test_other_contexts_find_the_path_as_it_was(prepared: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order(prepared, settings(tmp_path), QUIET, workers=1)
    done: list[str] = []
    monkeypatch.setattr(
        stages,
        "STAGES",
        [replace(stage, do=lambda *task, stage=stage: done.append(stage.name) or stage.do(*task)) for stage in STAGES],
    )
    longer = settings(tmp_path, directory=str(tmp_path / "longer"), mode="fill_long_buckets", document_masks=True)
    order(prepared, longer, QUIET, workers=1)
    assert set(done) == {"lay", "contexts", "finish"}
    done.clear()
    order(prepared, settings(tmp_path, directory=str(tmp_path / "more"), neighbors=3), QUIET, workers=1)
    assert set(done) == {"search", "recall", "threshold", "duplicates", "path", "lay", "contexts", "finish"}


def test_identical_settings_are_reused_and_others_refused(prepared: DataConfig, tmp_path: Path):
    config = settings(tmp_path)
    order(prepared, config, QUIET, workers=1)
    before = tree(config.directory)
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        again = order(prepared, config, console)
    assert again is not None
    assert tree(config.directory) == before
    assert "already ordered by these settings" in console.export_text()
    with pytest.raises(ValueError, match=r"order\.neighbors = 5: order\.directory = .* was made with 6; set it back"):
        order(prepared, replace(config, neighbors=5), QUIET)
    with pytest.raises(ValueError, match=r"order = \{.*was made with None"):
        open_prepared(prepared.directory).check_made_from(prepared, config)
    with pytest.raises(ValueError, match=r"order = None: data\.directory = .* was made with \{"):
        again.check_made_from(prepared)
    Path(config.directory, "manifest.json").unlink()
    with pytest.raises(ValueError, match="exists and is not ordered data"):
        order(prepared, config, QUIET)


def test_an_index_for_many_documents_goes_through_all_stages(tmp_path: Path, tokenizer_file: Path):
    """A group with more documents than are searched exactly gets an index, whose recall is measured."""
    sources = {}
    for name, numbers in (("many", range(1_300)), ("few", range(1_300, 1_340))):
        lines = (json.dumps({"text": sentences(number % 4, number, 12)}) + "\n" for number in numbers)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        sources[name] = SourceConfig(kind="json", path=str(tmp_path / f"{name}.jsonl"))
    data = DataConfig(
        directory=str(tmp_path / "data"),
        sources=sources,
        tokenizer=TokenizerConfig(path=str(tokenizer_file)),
        min_bucket_tokens=64,
        max_bucket_tokens=128,
        held_out_fraction=0.05,
        rest="pack",
    )
    prepare(data, QUIET)
    config = settings(tmp_path, exact_documents=1_024)
    manifest = order(data, config, QUIET, workers=1)
    assert manifest is not None
    check_ordered(manifest, data, config)
    report = json.loads(Path(config.directory, "order.json").read_text())
    assert report["approximate"] == ["train"]
    indexes = {file.name.removesuffix("-merged.faiss") for file in Path(config.work_directory).rglob("*-merged.faiss")}
    assert indexes == {"all-train", "000000-train"}, "one source is searched exactly"
    assert report["recall"]["held_out"] == 1
    assert 0.8 < report["recall"]["train"] < 1


@pytest.mark.full
def test_data_without_held_out_documents_is_ordered(prepared: DataConfig, tmp_path: Path):
    data = replace(prepared, directory=str(tmp_path / "data"), held_out_fraction=0.0)
    prepare(data, QUIET)
    config = settings(tmp_path, mode="fill_long_buckets")
    manifest = order(data, config, QUIET, workers=1)
    assert manifest is not None
    check_ordered(manifest, data, config)


@pytest.mark.parametrize("masks", by_lane([False, True], quick=[True]))
def test_tied_rows_are_seen_whole_and_others_as_they_are(prepared: DataConfig, tmp_path: Path, masks: bool):
    data = replace(
        prepared,
        directory=str(tmp_path / "data"),
        tokenizer=replace(prepared.tokenizer, knot_chunks=3),  # added to the existing tokenizer
    )
    prepare(data, QUIET)
    manifest = order(data, settings(tmp_path, document_masks=masks), QUIET, workers=1)
    assert manifest is not None
    knots = Knots(KnotsConfig(share=0.5, min_document_tokens=4, min_sequence_tokens=1), manifest.tokenizer(), 7)
    [bucket] = manifest.buckets("train")
    reader, numbers = manifest.reader(bucket), np.arange(bucket.sequences)[::-1]
    rows, starts, trained = read_rows(reader, numbers, masks, knots)
    assert trained is not None
    plain, before, every = read_rows(reader, numbers, masks, None)
    assert every is None
    tied = np.any(rows != plain, axis=1)
    assert 0.2 < tied.mean() < 0.8
    assert np.array_equal(tied, ~trained.all(axis=1))
    assert (starts is None) == (before is None) == (not masks)
    for row_index, (after, same) in enumerate(zip(starts or (), before or (), strict=True)):
        assert after == ((0,) if tied[row_index] else same)
    # A sequence is tied by its own number, independent of the sequences read with it.
    for row_index in range(0, len(numbers), 5):
        [row], _, [mask] = read_rows(reader, numbers[row_index : row_index + 1], masks, knots)  # type: ignore[misc]
        assert np.array_equal(row, rows[row_index])
        assert np.array_equal(mask, trained[row_index])


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Console]:
    with (tmp_path / "out").open("w") as out:
        yield Console(width=160, file=out)


def test_inspect_shows_pairs_path_and_a_context(
    prepared: DataConfig, tmp_path: Path, wide: Console, monkeypatch: pytest.MonkeyPatch
):
    manifest = order(prepared, settings(tmp_path), QUIET, workers=1)
    assert manifest is not None
    monkeypatch.chdir(tmp_path)
    inspect(manifest, wide, curriculum=CurriculumConfig(), loader=LoaderConfig(), model=PAPER_1B, steps=5, seed=0)
    wide.file.flush()
    shown = (tmp_path / "out").read_text()
    assert "Pairs of neighbours by cosine" in shown
    assert "Steps of the path by cosine" in shown
    report = json.loads(Path(tmp_path, "ordered", "order.json").read_text())
    for entry in report["neighbors"]:
        assert entry["first_line"][:40] in shown
        assert all(f"{other['similarity']:.3f}" in shown for other in entry["neighbors"])
    # The documents of a sequence are shown by origin and first line.
    part = shown[shown.index("of bucket 128") :]
    bucket = manifest.buckets("train")[0]
    number = int(shown[: shown.index("of bucket 128")].split("Sequence")[-1].strip().replace(",", ""))
    pieces = manifest.reader(bucket).pieces([number])[0]
    assert len(pieces) > 1
    for _, record, offset, _ in pieces.tolist():
        assert "/".join(manifest.origin(0, record).split("/")[-2:]) in part
        if not offset:
            text = manifest.tokenizer().tokenizer.decode(streams(prepared)[record])
            assert text[:30].strip() in part


@pytest.fixture(scope="module")
def apart(prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Return the settings of two sources of the same topics; the second one begins with copies from the first."""
    folder = tmp_path_factory.mktemp("apart")
    kept = [{"text": sentences(number % 4, number, 30 + 130 * (number % 9 == 0))} for number in range(60)]
    copies = [*kept[:6], *({"text": sentences(number % 4, number + 500, 30)} for number in range(24))]
    for name, records in (("first", kept), ("second", copies)):
        for part in range(2):
            (folder / name).mkdir(exist_ok=True)
            lines = (json.dumps(one) + "\n" for one in records[part::2])
            (folder / name / f"{part}.jsonl").write_text("".join(lines))
    sources = {name: SourceConfig(kind="json", path=str(folder / name)) for name in ("first", "second")}
    data = replace(prepared, directory=str(folder / "data"), source=SourceConfig(), sources=sources)
    prepare(data, QUIET)
    return data


@pytest.mark.parametrize("by", by_lane(["path", "knn", "random"], quick=["path"]))
def test_sources_stay_apart(apart: DataConfig, tmp_path: Path, by: str):
    config = settings(tmp_path, by=by, mode="fill_long_buckets" if by == "knn" else "in_context")
    manifest = order(apart, config, QUIET, workers=1)
    assert manifest is not None
    check_ordered(manifest, apart, config)
    inputs = manifest.inputs()
    owner = [entry["source"] for entry in inputs for _ in range(entry["records"])]
    assert [*manifest.sources] == ["first", "second"]
    assert min(manifest.sources.values()) >= 1 < max(manifest.sources.values()), "one has several parts"
    for split in SPLITS:
        for bucket in manifest.buckets(split):
            numbers = iter(manifest.reader(bucket).pieces(range(bucket.sequences)))
            for part in bucket.parts:
                assert manifest.ledgers[part.source].splits[split].sequences[bucket.length] == part.sequences
                for _ in range(part.sequences):
                    records = [record for record in next(numbers)[:, 1].tolist() if record != NO_DOCUMENT]
                    assert {owner[record] for record in records} == {part.source}
    # A copy in another source is a near-duplicate all the same, and the account of its own source drops it.
    placement = np.load(Path(config.directory, "placement.npy"))
    gone = placement[placement["length"] == 0]
    assert {(owner[record], owner[kept]) for record, _, kept in gone.tolist()} == {("second", "first")}
    for name, ledger in manifest.ledgers.items():
        before = open_prepared(apart.directory).ledgers[name]
        assert (ledger.records, ledger.documents, ledger.tokens) == (before.records, before.documents, before.tokens)
        dropped = sum(books.dropped_documents["near_duplicate"] for books in ledger.splits.values())
        assert dropped == (len(gone) if name == "second" else 0) >= 0
    assert len(gone) == 6
    assert "source 'second'" in manifest.origin(0, 61)
    assert "source 'first'" in manifest.origin(0, 59)


@pytest.mark.full
def test_the_path_of_a_source_is_that_of_the_source_alone(apart: DataConfig, tmp_path: Path):
    config = settings(tmp_path)
    order(apart, config, QUIET, workers=1)
    directory = WorkDirectory(apart, config, sha256_of(Path(apart.directory, "manifest.json")))
    documents, dropped = directory.documents(), np.zeros(90, dtype=np.bool_)
    dropped[directory.dropped()[:, 0]] = True
    steps = np.load(directory.folder("path") / "path.npy")
    done = 0
    for source in range(2):
        mine = documents.of_source(source)
        lists = [directory.neighbor_list(shard) for shard in documents.shards_of(source)]
        ids, cosines = np.concatenate([one[1] for one in lists]), np.concatenate([one[2] for one in lists])
        assert set(ids.ravel().tolist()) <= {*mine, path.NO_NEIGHBOR}, "neighbours are of the same source"
        # The source alone, whose documents are numbered from 0.
        alone = np.where(ids == path.NO_NEIGHBOR, ids, ids - np.uint32(mine.start))
        path.remove_dropped(alone, gone := dropped[mine.start : mine.stop])
        list(path.greedy_path(path.make_graph(alone, cosines), gone, tmp_path / f"{source}"))
        expected = np.fromfile(tmp_path / f"{source}", dtype=path.STEP_DTYPE)
        expected["document"] += np.uint32(mine.start)
        assert steps[done : done + len(expected)].tobytes() == expected.tobytes()
        done += len(expected)
    assert done == len(steps) == 84


@pytest.mark.parametrize("stage", by_lane(["documents", "embed", "neighbors", "duplicates", "path"], quick=[]))
def test_a_damaged_file_is_named_and_made_anew(prepared: DataConfig, tmp_path: Path, stage: str):
    reference, config = settings(tmp_path / "one"), settings(tmp_path / "two")
    order(prepared, reference, QUIET, workers=1)
    until = {"documents": "split", "neighbors": "search"}.get(stage, stage)
    for one in STAGES[: 1 + [one.name for one in STAGES].index(until)]:
        order(prepared, config, QUIET, workers=1, only=one.name)
    [folder] = Path(config.work_directory).glob(f"{stage}-*")
    file = folder / ("path.npy" if stage == "path" else "000002.npy")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{file}: is damaged \(.*\); delete it and run the same command again"):
        order(prepared, config, QUIET, workers=1)
    file.unlink()
    order(prepared, config, QUIET, workers=1)
    assert tree(config.directory) == tree(reference.directory)


def test_bars_move_inside_the_long_tasks(prepared: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = settings(tmp_path)
    directory = WorkDirectory(prepared, config, sha256_of(Path(prepared.directory, "manifest.json")))
    monkeypatch.setattr(path, "CHECKPOINT_STEPS", 10)
    for stage in STAGES:
        for number in range(stage.tasks(directory)):
            progress: list[float] = []
            stage.do(directory, number, progress.append)
            assert progress == sorted(progress)
            assert all(0 <= part <= 1 for part in progress)
            if stage.name in ("embed", "search", "recall", "threshold", "path", "finish"):
                assert progress[-1] == 1
            if stage.name == "path":
                assert len(progress) == -(-len(np.load(stage.file(directory, 0))) // 10)


def test_documents_are_read_whole_and_in_parts(prepared: DataConfig, tmp_path: Path):
    config = settings(tmp_path)
    order(prepared, config, QUIET, workers=1, only="documents")
    found = Documents(
        prepared.directory,
        WorkDirectory(prepared, config, sha256_of(Path(prepared.directory, "manifest.json"))).folder("documents"),
    )
    expected = list(streams(prepared).values())
    assert len(found) == len(expected)
    for number, stream in enumerate(expected):
        assert found.tokens(number).tolist() == stream
        pairs = len(stream) - 1
        for offset in range(0, pairs, max(1, pairs // 5)):
            for count in {1, (pairs - offset + 1) // 2, pairs - offset} - {0}:
                assert found.tokens(number, offset, count).tolist() == stream[offset : offset + count + 1]


def test_data_that_lacks_documents_is_refused(prepared: DataConfig, tmp_path: Path):
    for changed, message in [
        ({"rest": "drop"}, r"order\.mode = 'in_context': needs every document whole.*data\.rest = 'pack'"),
        ({"method": "concat", "rest": "drop"}, r"data\.method = 'concat' with data\.rest = 'drop' drops parts"),
    ]:
        with pytest.raises(ValueError, match=message):
            order(replace(prepared, **changed), settings(tmp_path), QUIET)
    with pytest.raises(ValueError, match=r"needs the buckets of dataset decomposition, and data\.method is 'best_fit'"):
        order(replace(prepared, method="best_fit"), settings(tmp_path, mode="fill_long_buckets"), QUIET)
    with pytest.raises(
        ValueError, match=r"order\.context_tokens = 48: .* from data\.min_bucket_tokens = 16 to .*; set it to 32"
    ):
        order(prepared, settings(tmp_path, context_tokens=48), QUIET)
    settings(tmp_path, context_tokens=32).check(prepared)
    with pytest.raises(ValueError, match="--stage walk: not a stage; name one of documents, split, fit, embed"):
        order(prepared, settings(tmp_path), QUIET, only="walk")


@pytest.mark.full
def test_advice_about_the_mode(prepared: DataConfig, tmp_path: Path):
    advice = "set it to '(in_context)' or '(fill_long_buckets)', and order.directory"
    with pytest.raises(ValueError, match=rf"order\.mode = 'off': nothing to order; {advice}") as error:
        order(prepared, OrderConfig(), QUIET)
    found = re.search(advice, str(error.value))
    assert found is not None
    for mode in found.groups():
        order(prepared, settings(tmp_path / mode, mode=mode), QUIET, workers=1, only="documents")


@pytest.mark.full
def test_advice_about_too_many_records(prepared: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages, "NO_DOCUMENT", 60)
    advice = "prepare and order the sources in parts"
    with pytest.raises(ValueError, match=f"has 92 records, and ordered data numbers at most 59; {advice}"):
        order(prepared, settings(tmp_path), QUIET, workers=1, only="documents")
    for part, files in enumerate(("[012].jsonl", "[34].jsonl")):
        source = replace(prepared.source, path=f"{prepared.source.path}/{files}")
        data = replace(prepared, source=source, directory=str(tmp_path / f"data-{part}"))
        prepare(data, QUIET, workers=1)
        order(data, settings(tmp_path / f"{part}"), QUIET, workers=1, only="documents")


@pytest.mark.full
def test_advice_about_data_that_was_made_wrongly(prepared: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A preparation writes wrong offsets of the later pieces of documents."""
    data, config = replace(prepared, directory=str(tmp_path / "data")), settings(tmp_path)
    append = BucketWriter.append
    with monkeypatch.context() as patch:
        patch.setattr(
            BucketWriter,
            "append",
            lambda self, row, pieces: append(self, row, [(one, at + (at > 0), start) for one, at, start in pieces]),
        )
        prepare(data, QUIET, workers=1)
    advice = r"do not use it, or delete its directory and run `longring prepare RECIPE`"
    with pytest.raises(ValueError, match=f"and none from pair .*, so the data was made wrongly; {advice}"):
        order(data, config, QUIET, workers=1, only="documents")
    shutil.rmtree(data.directory)
    prepare(data, QUIET, workers=1)
    order(data, config, QUIET, workers=1, only="documents")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "off"}, r"order\.directory = .*: order\.mode is 'off'; remove it"),
        ({"directory": ""}, r"order\.directory = '': order\.mode is 'in_context'; set it"),
        ({"directory": "s3://x/y"}, r"order\.directory = s3://x/y: must be a local directory; name one, and copy"),
        ({"work_directory": "s3://x/y"}, r"order\.work_directory = s3://x/y: must be a local directory; name one"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changed)
