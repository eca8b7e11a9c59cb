"""Relatedness of the documents of a context: by the path, by kNN groups and at random, for the same documents.

    python benchmarks/related_orders.py --json rows.json   # three minutes
    python benchmarks/related_orders.py --corpus wiki.txt
    python benchmarks/related_orders.py --encoder NAME --long-documents head

Documents are Python's standard library, whose packages are a truth that the method does not know, and with --corpus a
text in WikiText's form (articles that begin with " = Title = "). Rows have the share of neighbouring documents of one
context that are of one package, of those in any package; and the mean cosine of two documents of one context, and of
two of neighbouring contexts.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.packages import FEW_PACKAGES, QUIET, packages_of
from lib.script import Row, make_parser, make_table, write_record
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format.document import NO_DOCUMENT
from longring.data.order.stages import order
from longring.data.order_config import OrderConfig
from longring.data.prepare.prepare import prepare
from rich.console import Console


def compare_orders(folder: Path, source: SourceConfig, max_tokens: int, vectors: dict[str, Any]) -> list[Row]:
    """Return a row for each order of one corpus; `vectors` are the settings of the encoder."""
    data = DataConfig(
        directory=str(folder / "data"),
        source=source,
        tokenizer=TokenizerConfig(vocab_size=8192),
        max_bucket_tokens=max_tokens,
        shard_tokens=1 << 25,
        held_out_fraction=0.0,
        rest="pack",
    )
    prepare(data, QUIET)
    rows = []
    for by in ("path", "knn", "random"):
        config = OrderConfig(mode="in_context", by=by, directory=str(folder / by), neighbors=20, **vectors)
        manifest = order(data, config, QUIET, workers=1)
        assert manifest is not None
        packages = packages_of(manifest)
        [bucket] = manifest.buckets("train")
        pairs = [
            (packages[one], packages[other])
            for pieces in manifest.reader(bucket).pieces(range(bucket.sequences))
            for one, other in pairwise(pieces[pieces[:, 1] != NO_DOCUMENT, 1].tolist())
        ]
        report = json.loads(Path(config.directory, "order.json").read_text())
        known = [pair for pair in pairs if pair[0] != "."]
        rows.append(
            {
                "by": by,
                "documents": report["path"]["documents"],
                "near_duplicates": sum(
                    books.dropped_documents["near_duplicate"] for books in manifest.ledger.splits.values()
                ),
                "threshold": report["duplicates"]["threshold"],
                "context_documents": report["contexts"]["documents"],
                "one_package": float(np.mean([one == other for one, other in known])) if known else None,
                "inside": report["contexts"]["inside"],
                "across": report["contexts"]["across"],
                "jumps": report["path"]["jumps"],
            }
        )
    return rows


def wiki_articles(file: Path, folder: Path) -> SourceConfig:
    """Write the articles of a text in WikiText's form as JSON lines and return them as a source."""
    text = file.read_text(encoding="utf-8")
    articles = [one for one in re.split(r"(?m)^(?= = [^=].*[^=] = $)", text) if one.strip()]
    target = folder / "articles.jsonl"
    target.write_text("".join(json.dumps({"text": article}) + "\n" for article in articles))
    return SourceConfig(kind="json", path=str(target))


def show(name: str, rows: list[Row]) -> None:
    """Print a line for each order of one corpus."""
    first = rows[0]
    title = (
        f"{name}: {first['documents']:,} documents, {first['near_duplicates']} near-duplicates left out "
        f"(cosine from {first['threshold']:.2f} on)"
    )
    columns = ("order", "documents a context", "one package", "cosine inside", "across", "jumps")
    table = make_table(title, columns, left=("order",))
    for row in rows:
        share = "" if row["one_package"] is None else f"{row['one_package']:.1%}"
        table.add_row(
            row["by"],
            f"{row['context_documents']:.1f}",
            share,
            f"{row['inside']:.3f}",
            f"{row['across']:.3f}",
            f"{row['jumps']:,}" if row["by"] == "path" else "",
        )
    Console().print(table)


def main() -> int:
    parser = make_parser(__doc__ or "", quick="some packages of the library: under a minute")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="a text in WikiText's form, beside the library")
    parser.add_argument("--encoder", default="", metavar="NAME", help="encoder, as order.encoder")
    parser.add_argument("--long-documents", choices=("windows", "head"), default="windows")
    options = parser.parse_args()
    library = SourceConfig() if options.size == "full" else SourceConfig(kind="text", path=FEW_PACKAGES)
    max_tokens = 8192 if options.size == "smallest" else 32_768
    vectors = {"encoder": options.encoder, "long_documents": options.long_documents}
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "stdlib").mkdir()
        found["stdlib"] = compare_orders(folder / "stdlib", library, max_tokens, vectors)
        show("Python's standard library", found["stdlib"])
        if options.corpus:
            (folder / "corpus").mkdir()
            source = wiki_articles(options.corpus, folder / "corpus")
            found["corpus"] = compare_orders(folder / "corpus", source, min(max_tokens, 16_384), vectors)
            show(options.corpus.name, found["corpus"])
    write_record(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
