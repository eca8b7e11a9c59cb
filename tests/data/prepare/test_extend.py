"""Extension of prepared data: only new sources are made, the old data stays, and no kill leaves anything else."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.died import Died, die_after
from helpers.files import tree
from helpers.lanes import by_lane
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.files import sha256_of
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.prepare import input_shard
from longring.data.prepare.prepare import prepare
from rich.console import Console

QUIET = Console(quiet=True)


@pytest.fixture
def both(make_config: Callable[..., DataConfig], words: Callable[..., str], tmp_path: Path) -> DataConfig:
    """Return the settings of three sources; the first in the recipe, `a`, has copies of documents of `web`."""
    texts = {name: [words(30 + 9 * n, n + start) for n in range(24)] for name, start in (("web", 0), ("books", 99))}
    texts["a"] = [*texts["web"][:12], *(words(50, 7 * n) for n in range(12))]
    for name, documents in texts.items():
        (tmp_path / name).mkdir()
        for part in range(3):
            lines = (json.dumps({"text": text}) + "\n" for text in documents[part::3])
            (tmp_path / name / f"{part}.jsonl").write_text("".join(lines))
    sources = {name: SourceConfig(kind="json", path=str(tmp_path / name)) for name in ("a", "web", "books")}
    base = make_config([], source=SourceConfig(), sources=sources, input_shard_bytes=1, rest="pack")
    (tmp_path / "documents.jsonl").unlink()
    return base


def only(config: DataConfig, *names: str) -> DataConfig:
    return replace(config, sources={name: config.sources[name] for name in names})


def shards(manifest: Manifest) -> dict[str, list[bytes]]:
    """Return the content of the shards of each source, in order."""
    found = {}
    for bucket in (*manifest.buckets("train"), *manifest.buckets("held_out")):
        for part in bucket.parts:
            entries = bucket.shards[part.first_shard : part.first_shard + part.num_shards]
            found.setdefault(part.source, []).extend(entry["sha256"].item() for entry in entries)
    return found


@pytest.mark.parametrize("workers", by_lane([1, 3], quick=[1]))
def test_only_new_sources_are_made_and_each_has_the_bytes_of_a_fresh_preparation(
    both: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
):
    before = prepare(only(both, "web"), QUIET, workers=1)
    old, digest = tree(both.directory), sha256_of(Path(both.directory, "manifest.json"))
    done: list[int] = []
    run = input_shard._InputShardWriter.run
    monkeypatch.setattr(
        input_shard._InputShardWriter, "run", lambda self, file: done.append(int(file.name)) or run(self, file)
    )
    screen = Console(width=300, record=True, file=io.StringIO())
    manifest = prepare(both, screen, workers=workers)
    assert done in ([3, 4, 5, 6, 7, 8], [])  # worker processes have lists of their own
    kept = tmp_path / str(manifest.extends)
    assert f"prepared is extended; the data before is {kept}" in screen.export_text()
    # The data before is what it was, to the byte, and its shards take no space twice.
    assert tree(kept) == old
    assert sha256_of(kept / "manifest.json") == digest
    for file in kept.rglob("*.tar"):
        assert file.samefile(Path(both.directory, file.relative_to(kept)))
    list(manifest.verify())
    fresh = prepare(replace(both, directory=str(tmp_path / "fresh")), QUIET, workers=1)
    assert [*manifest.sources] == ["web", "a", "books"]
    assert [*fresh.sources] == ["a", "web", "books"]
    assert shards(manifest) == shards(fresh)
    assert manifest.ledgers == fresh.ledgers
    assert manifest.ledgers["web"] == before.ledgers["web"]
    assert manifest.unigram().tolist() == fresh.unigram().tolist()
    assert sorted(map(str, manifest.inputs())) == sorted(map(str, fresh.inputs()))
    # Extending source by source gives the same, and the result is used as it is.
    again = replace(both, directory=str(tmp_path / "again"))
    for names in (("web",), ("a", "web"), ("a", "web", "books")):
        prepare(only(again, *names), QUIET, workers=1)
    assert shards(open_prepared(again.directory)) == shards(fresh)
    whole = tree(both.directory)
    prepare(both, QUIET)
    assert tree(both.directory) == whole


def test_a_run_on_the_data_before_is_told_where_it_is(both: DataConfig):
    web = only(both, "web")
    prepare(web, QUIET, workers=1)
    prepare(only(both, "web", "books"), QUIET, workers=1)
    manifest = prepare(both, QUIET, workers=1)
    advice = r"set it to (\S+), the data before, or add these sources to the recipe"
    wanted, directory = only(both, "web", "books"), both.directory
    for added in ("a", "books"):
        with pytest.raises(ValueError, match=rf"= {directory}: has been extended by {added}; {advice}") as error:
            manifest.check_made_from(replace(wanted, directory=directory))
        found = re.search(advice, str(error.value))
        assert found is not None
        (
            manifest,
            directory,
        ) = open_prepared(found[1]), found[1]
        manifest.check_made_from(replace(wanted, directory=directory))
        wanted = web
    open_prepared(both.directory).check_made_from(both)


def test_a_changed_old_source_is_refused_with_its_key(both: DataConfig):
    prepare(only(both, "web"), QUIET, workers=1)
    before = tree(both.directory)
    for changed, message in (
        (
            {"web": replace(both.sources["web"], text_field="body")},
            r"data\.sources\.web\.text_field = 'body': .* 'text'",
        ),
        ({"a": both.sources["a"]}, r"data\.sources\.a = \{.* was made with None; set it back"),
    ):
        sources = {**changed, "books": both.sources["books"]}
        with pytest.raises(ValueError, match=message):
            prepare(replace(both, sources=sources), QUIET)
    with pytest.raises(ValueError, match=r"data\.seed = 5: .* was made with 0"):
        prepare(replace(both, seed=5), QUIET)
    assert tree(both.directory) == before


@pytest.mark.parametrize("point", by_lane(range(18), quick=[17], slow=[*range(5), *range(6, 16)]))
def test_stopped_before_any_rename_and_continued(
    both: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
):
    both = replace(both, input_shard_bytes=2**28)
    reference = replace(both, directory=str(tmp_path / "reference" / "prepared"))
    for config in (both, reference):
        prepare(only(config, "web"), QUIET, workers=1)
    old = tree(both.directory)
    name = prepare(reference, QUIET, workers=1).extends
    with monkeypatch.context() as patch:
        die_after(point, patch)
        try:
            prepare(both, QUIET, workers=1)
        except Died:
            # The data before is whole, under its name or the one beside it.
            found = [path for path in (Path(both.directory), tmp_path / str(name)) if path.exists()]
            assert tree(found[0]) == old
    prepare(both, QUIET, workers=1)
    assert tree(both.directory) == tree(reference.directory)
    assert tree(tmp_path / str(name)) == old
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".partial", ".lock"))]


@pytest.mark.full
def test_held_out_documents_stay_held_out_in_their_copies(both: DataConfig):
    """Copies of old documents come with a new source: each is in the split of its original."""
    prepare(only(both, "web"), QUIET, workers=1)
    manifest = prepare(both, QUIET, workers=1)
    lines = [
        [json.loads(line)["text"] for file in entry["files"] for line in Path(file).read_text().splitlines()]
        for entry in manifest.inputs()
    ]
    splits: dict[str, set[Any]] = {}
    for split in ("train", "held_out"):
        for bucket in manifest.buckets(split):
            for pieces in manifest.reader(bucket).pieces(range(bucket.sequences)):
                for shard, record, *_ in pieces.tolist():
                    if record < len(lines[shard]):
                        splits.setdefault(lines[shard][record], set()).add(split)
    assert len(splits) == 60, "twelve documents come twice"
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "held_out"}


@pytest.mark.full
def test_a_trained_tokenizer_stays_and_a_lone_source_gets_its_name(both: DataConfig, tmp_path: Path):
    lone = replace(both, source=both.sources["web"], sources={}, tokenizer=TokenizerConfig(vocab_size=280))
    before = prepare(lone, QUIET, workers=1)
    damaged = min(Path(both.directory).rglob("*.tar"))
    damaged.unlink()
    sources = {"books": both.sources["books"], "documents": both.sources["web"]}
    more = replace(lone, source=SourceConfig(), sources=sources)
    # A shard that is missing is found after the extension, which is repaired as any data is.
    with pytest.raises(ValueError, match="missing, .*; run `longring prepare RECIPE`, which makes it again"):
        prepare(more, QUIET, workers=1)
    manifest = prepare(more, QUIET, workers=1)
    list(manifest.verify())
    assert manifest.files["tokenizer.json"] == before.files["tokenizer.json"]
    assert [*manifest.sources] == ["documents", "books"]
