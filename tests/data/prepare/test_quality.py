"""Scores of documents: bins that are sources of their own, and sampling without replacement."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.files import tree
from helpers.lanes import by_lane
from hypothesis import example, given
from hypothesis import strategies as st
from longring.data.config import DataConfig, SourceConfig
from longring.data.format.document import Document
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.prepare import input_shard, sampling
from longring.data.prepare.prepare import prepare, prepare_part
from longring.data.prepare.sampling import sampling_key, threshold
from longring.data.read.shares import Cells
from rich.console import Console
from scipy import stats

QUIET = Console(quiet=True)
EDGES = (1.5, 3.0)
BAD = [
    '{"text": "no score"}\n',
    '{"text": "a text as score", "quality": "2.0"}\n',
    '{"text": "a truth value", "quality": true}\n',
    '{"text": "infinite", "quality": 1e999}\n',
    "broken\n",
    '{"text": 3, "quality": 2.0}\n',
]
"""Bad records; all but the last one have no score, and so belong to the lowest bin."""


@pytest.fixture
def records(words: Callable[..., str]) -> list[dict[str, Any]]:
    """Return 96 documents with scores from 0 to 4.75, which include the edges."""
    return [{"text": words(30 + n % 7, n), "quality": n % 20 / 4} for n in range(96)]


@pytest.fixture
def config(make_config: Callable[..., DataConfig], records: list[dict[str, Any]], tmp_path: Path) -> DataConfig:
    """Return the settings of a source of these documents and BAD in four files, with scores and no bins."""
    (tmp_path / "web").mkdir()
    for part in range(4):
        lines = [json.dumps(one) + "\n" for one in records[part::4]] + BAD * (part == 2)
        (tmp_path / "web" / f"{part}.jsonl").write_text("".join(lines))
    source = SourceConfig(kind="json", path=str(tmp_path / "web"), score_field="quality")
    return make_config([], source=SourceConfig(), sources={"web": source}, input_shard_bytes=1, rest="pack")


def changed(config: DataConfig, directory: str = "prepared", **settings: Any) -> DataConfig:
    other = Path(config.directory).with_name(directory)
    return replace(config, directory=str(other), sources={"web": replace(config.sources["web"], **settings)})


def texts_of(manifest: Manifest) -> dict[str, list[str]]:
    """Return the texts of each source's documents, sorted, decoded from the shards."""
    pieces: dict[tuple[str, int, int], list[tuple[int, list[int]]]] = {}
    owners = [source for source, count in manifest.sources.items() for _ in range(count)]
    for split in ("train", "held_out"):
        for bucket in manifest.buckets(split):
            reader, every = manifest.reader(bucket), range(bucket.sequences)
            for row, found in zip(reader.read(every).tolist(), reader.pieces(every), strict=True):
                ends = [*found[1:, 3].tolist(), bucket.length]
                for (shard, record, offset, start), end in zip(found.tolist(), ends, strict=True):
                    if record < 2**32 - 1:
                        key = owners[shard], shard, record
                        pieces.setdefault(key, []).append((offset, row[start + 1 : end + 1]))
    texts: dict[str, list[str]] = {source: [] for source in manifest.sources}
    for (source, _, _), found in pieces.items():
        tokens = [token for _, part in sorted(found) for token in part]
        texts[source].append(manifest.tokenizer().decode(tokens[:-1]))
    return {source: sorted(found) for source, found in texts.items()}


def test_bins_are_sources_and_their_ledgers_add_up(config: DataConfig, records: list[dict[str, Any]]):
    binned = changed(config, score_edges=EDGES)
    manifest, whole = prepare(binned, QUIET, workers=1), prepare(changed(config, "whole"), QUIET, workers=1)
    assert [*manifest.sources] == [*manifest.ledgers] == ["web.0", "web.1", "web.2"]
    low, high = (-math.inf, *EDGES), (*EDGES, math.inf)
    expected = {
        f"web.{number}": sorted(one["text"] for one in records if low[number] <= one["quality"] < high[number])
        for number in range(3)
    }
    assert texts_of(manifest) == expected
    assert {name: ledger.documents for name, ledger in manifest.ledgers.items()} == {
        name: len(texts) for name, texts in expected.items()
    }
    # A bad record counts once: in the bin of its score, or in the lowest if it has none.
    assert [ledger.bad.counts.total() for ledger in manifest.ledgers.values()] == [5, 1, 0]
    assert manifest.ledger.records == whole.ledger.records == 96 + len(BAD)
    assert manifest.ledger.bad.counts == whole.ledger.bad.counts
    for split, books in manifest.ledger.splits.items():
        other = whole.ledger.splits[split]
        assert (books.documents, books.tokens) == (other.documents, other.tokens)
        assert books.document_lengths == other.document_lengths
    assert sum(entry["records"] for entry in manifest.inputs()) == manifest.ledger.records
    # Shares of the run name the bins.
    cells = Cells.of(manifest.buckets("train"))
    for name in ("web.0", "web.2@32"):
        assert cells.named(name)
    # Missing shards of a bin are made again.
    before = tree(binned.directory)
    for file in Path(binned.directory).glob("shards/000005/*.tar"):
        file.unlink()
    prepare(binned, QUIET, workers=1)
    assert tree(binned.directory) == before


def test_bad_records_of_the_lowest_bin_are_few_among_all(config: DataConfig):
    """Five records without a score are more than a twentieth of the lowest bin, and less of the source."""
    prepare(changed(config, score_edges=(0.25, 4.5), limit_documents=102), QUIET, workers=1)
    strict = replace(changed(config, "strict", score_edges=(0.25, 4.5), limit_documents=102), max_bad_fraction=0.058)
    with pytest.raises(ValueError, match=r"5 of 102 records of source 'web\.0' are bad \(1 broken_json, 1 missing"):
        prepare(replace(strict, max_bad_fraction=0.01), QUIET, workers=1)
    prepare(strict, QUIET, workers=1)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_scores_in_columns(config: DataConfig, records: list[dict[str, Any]], tmp_path: Path, kind: str):
    table = pyarrow.table({name: [one[name] for one in records] for name in ("quality", "text")})
    file = tmp_path / f"web.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table.append_column("other", table["text"]), file, row_group_size=10)
    else:
        file.write_text("quality,text\n" + "".join(f"{one['quality']},{one['text']}\n" for one in records))
    settings = {"score_edges": EDGES, "sample_fraction": 0.75}
    found = texts_of(prepare(changed(config, "found", kind=kind, path=str(file), **settings), QUIET, workers=1))
    lines = "".join(json.dumps(one) + "\n" for one in records)
    (tmp_path / "web.jsonl").write_text(lines)
    path = str(tmp_path / "web.jsonl")
    assert found == texts_of(prepare(changed(config, path=path, **settings), QUIET, workers=1))
    assert sum(map(len, found.values())) == 72


def subset_odds(scores: list[float], temperature: float, count: int) -> dict[frozenset[int], float]:
    """Return the probability of each set of documents by drawing them one after another, each with its odds."""
    weights = [math.exp(score / temperature) for score in scores]
    found: dict[frozenset[int], float] = {}
    for drawn in itertools.permutations(range(len(scores)), count):
        left, chance = sum(weights), 1.0
        for index in drawn:
            chance *= weights[index] / left
            left -= weights[index]
        found[frozenset(drawn)] = found.get(frozenset(drawn), 0.0) + chance
    return found


@pytest.mark.parametrize(("temperature", "scored"), [(1.0, True), (2.5, True), (1.0, False)])
def test_documents_are_drawn_as_one_after_another_without_replacement(temperature: float, scored: bool):
    scores = [0.0, 1.0, -1.5, 2.0, 0.3] if scored else [0.0] * 5
    source = SourceConfig(kind="json", path="x", score_temperature=temperature)
    documents = [Document(n, "", "", bytes([n]) * 16, score) for n, score in enumerate(scores)]
    runs, counts = 6_000, Counter[frozenset[int]]()
    for seed in range(runs):
        keys = np.array([sampling_key(document, source, seed) for document in documents])
        counts[frozenset(np.flatnonzero(keys >= threshold(keys, 0.4)).tolist())] += 1
    expected = subset_odds(scores, temperature, 2)
    assert counts.keys() == expected.keys()
    observed = [counts[one] for one in expected]
    assert stats.chisquare(observed, [runs * chance for chance in expected.values()]).pvalue > 1e-3
    # The test can fail: other odds than these are refused.
    wrong = subset_odds([2 * score + n / 5 for n, score in enumerate(scores)], temperature, 2)
    assert stats.chisquare(observed, [runs * wrong[one] for one in expected]).pvalue < 1e-6


@given(
    keys=st.lists(st.floats(-1e18, 1e18), min_size=1, max_size=40, unique=True),
    fraction=st.floats(0, 1),
)
@example(keys=[1e16], fraction=0.0)  # adding 1 leaves it as it is
def test_the_threshold_keeps_as_many_as_asked(keys: list[float], fraction: float):
    found = np.array(keys)
    assert np.count_nonzero(found >= threshold(found, fraction)) == round(fraction * len(keys))


@pytest.mark.parametrize("bins", [(), EDGES])
def test_a_sample_does_not_depend_on_files_order_or_processes(
    config: DataConfig, records: list[dict[str, Any]], tmp_path: Path, bins: tuple[float, ...]
):
    settings = {"sample_fraction": 0.3, "score_temperature": 0.5, "score_edges": bins}
    manifest = prepare(changed(config, **settings), QUIET, workers=1)
    kept = sorted(text for texts in texts_of(manifest).values() for text in texts)
    assert len(kept) == round(0.3 * 96) == manifest.ledger.documents
    assert manifest.ledger.left_out_documents == {"not_sampled": 96 - len(kept)}
    assert manifest.ledger.left_out_tokens.total() == 0
    manifest.ledger.check()
    scores = {one["text"]: one["quality"] for one in records}
    mean = float(np.mean([scores[text] for text in kept]))
    assert mean > np.mean([*scores.values()]) + 1, "better documents are likelier"
    # Two files in another order: the same documents.
    (tmp_path / "other").mkdir()
    for part in range(2):
        lines = (json.dumps(one) + "\n" for one in records[::-1][part::2])
        (tmp_path / "other" / f"{part}.jsonl").write_text("".join(lines))
    other = prepare(changed(config, "other-data", path=str(tmp_path / "other"), **settings), QUIET, workers=1)
    assert sorted(text for texts in texts_of(other).values() for text in texts) == kept
    another = prepare(replace(changed(config, "seeded", **settings), seed=1), QUIET, workers=1)
    assert sorted(text for texts in texts_of(another).values() for text in texts) != kept


@pytest.mark.full
def test_parts_and_processes_make_the_same_bytes(config: DataConfig):
    settings = {"sample_fraction": 0.4, "score_edges": EDGES}
    reference = changed(config, "reference", **settings)
    prepare(reference, QUIET, workers=1)
    prepare(several := changed(config, "several", **settings), QUIET, workers=3)
    parts = changed(config, **settings)
    for part in (0, 2, 1):
        prepare_part(parts, QUIET, part, 3, workers=1)
    prepare(parts, QUIET, workers=1)
    assert tree(several.directory) == tree(reference.directory) == tree(parts.directory)
    # Finished data is repaired with the threshold that it was made with.
    min(Path(parts.directory).rglob("*.tar")).unlink()
    prepare(parts, QUIET, workers=1)
    assert tree(parts.directory) == tree(reference.directory)


@pytest.mark.parametrize("stop", by_lane([0, 2, 3], quick=[2]))
def test_a_pass_over_the_scores_is_continued(config: DataConfig, monkeypatch: pytest.MonkeyPatch, stop: int):
    sampled = changed(config, sample_fraction=0.4)
    reference = replace(sampled, directory=f"{sampled.directory}-reference")
    prepare(reference, QUIET, workers=1)
    passes: list[int] = []
    write = sampling.write_keys

    def stopping(config: DataConfig, partial: Path, number: int, shard: input_shard.InputShard) -> None:
        if len(passes) == stop:
            raise KeyboardInterrupt
        passes.append(number)
        write(config, partial, number, shard)

    monkeypatch.setattr(sampling, "write_keys", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(sampled, QUIET, workers=1)
    assert passes == list(range(stop))
    stop = -1
    prepare(sampled, QUIET, workers=1)
    assert passes == [0, 1, 2, 3], "what is read is not read again"
    assert tree(sampled.directory) == tree(reference.directory)


@pytest.mark.full
def test_new_sources_are_sampled_as_in_a_fresh_preparation(
    config: DataConfig, records: list[dict[str, Any]], tmp_path: Path
):
    web, books = config.sources["web"], replace(config.sources["web"], sample_fraction=0.5, score_edges=EDGES)
    (tmp_path / "books").mkdir()
    for part in range(2):
        lines = (json.dumps({**one, "text": f"book {one['text']}"}) + "\n" for one in records[part:48:2])
        (tmp_path / "books" / f"{part}.jsonl").write_text("".join(lines))
    books = replace(books, path=str(tmp_path / "books"))
    prepare(config, QUIET, workers=1)
    more = replace(config, sources={"books": books, "web": replace(web)})
    extended = prepare(more, QUIET, workers=1)
    assert [*extended.sources] == ["web", "books.0", "books.1", "books.2"]
    fresh = prepare(replace(more, directory=f"{more.directory}-fresh"), QUIET, workers=1)
    assert texts_of(extended) == texts_of(fresh)
    assert sum(extended.ledgers[f"books.{number}"].documents for number in range(3)) == 24
    assert open_prepared(more.directory).ledgers == fresh.ledgers
