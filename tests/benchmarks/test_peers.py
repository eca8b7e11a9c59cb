"""Other projects beside LongRing: a member that cannot run is an error and not an end."""

from __future__ import annotations

import io
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
from lib.loader_peers import _reader
from prepare import MIN_TOKENS, tokens_of, tried

SCRIPT = """
import tarfile
from pathlib import Path

def tokenize_and_shard(file_names, my_id, output_dir, enc, min_bucket, max_bucket):
    assert Path(file_names[0]).name == "corpus.jsonl" and enc == "tokenizer.json"
    print("one of many lines")
    for bucket in range(min_bucket, max_bucket + 1):
        folder = Path(output_dir, str(bucket))
        folder.mkdir(parents=True)
        (folder / "shard-0000000.tar").touch()
"""


def test_the_script_of_a_clone_runs_as_it_is(tmp_path, monkeypatch, capsys):
    tokenizer = SimpleNamespace(PreTrainedTokenizerFast=lambda tokenizer_file: tokenizer_file.rsplit("/", 1)[1])
    monkeypatch.setitem(sys.modules, "transformers", tokenizer)
    (tmp_path / "clone" / "scripts").mkdir(parents=True)
    (tmp_path / "clone" / "scripts" / "make_dd_buckets.py").write_text(SCRIPT)
    prepared = tried(tmp_path / "clone", tmp_path)
    assert not isinstance(prepared, str), prepared
    folder = prepared("again")
    assert sorted(path.name for path in folder.iterdir()) == ["10", "11", "12", "13", "8", "9"]
    assert capsys.readouterr().out == ""
    assert tokens_of(folder) == 0
    with tarfile.open(folder / "8" / "shard-0000000.tar", "w") as tar:
        for name in ("a", "b"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert tokens_of(folder) == 2 * MIN_TOKENS


def test_a_clone_that_cannot_run_is_its_error(tmp_path):
    assert "FileNotFoundError" in str(tried(tmp_path, tmp_path))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "make_dd_buckets.py").write_text("import not_installed_anywhere")
    assert tried(tmp_path, tmp_path) == "ModuleNotFoundError: No module named 'not_installed_anywhere'"


def test_a_reader_counts_targets_and_begins_again():
    rows = np.zeros((3, 9), np.uint16)
    batches = [np.zeros((2, 9)), np.zeros((1, 9))]
    assert _reader(rows, lambda: batches)(8 * 4) == 8 * 5
