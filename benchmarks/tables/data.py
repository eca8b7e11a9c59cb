"""Tables on preparation, order and mixes of data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import mean, stdev
from typing import Any

from .table import Cells, Row, Table


def data_path(preparing: Any, loading: Any, training: Any) -> Iterator[Cells]:
    """Yield what was measured of preparation, of the loader and of training on buckets, each with its goal."""
    ours_is = {row["member"]: row["ours_is"] for row in preparing["rows"]}
    [kept] = (row["kept"] for row in preparing["rows"] if "kept" in row)
    alone, script, apple = (f"{ours_is[member]:.2f}" for member in ("bare", "script", "apple"))
    command = f"`benchmarks/prepare.py` ({preparing['tokens'] / 1e6:.1f}M tokens)"
    yield command, "tokens/s of preparation over those of the tokenizer's fastest batch call alone", alone, "0.85"
    yield "", "tokens/s of preparation over those of the released script's method, reimplemented", script, "1.15"
    yield (
        "",
        f"tokens/s of preparation over those of the script itself, which writes {kept:.0%} of the tokens",
        apple,
        "",
    )
    sizes = "; ".join(f"{preparing[name]:.2f}" for name in ("bytes_per_token_256", "script_bytes_per_token_256"))
    yield "", "bytes for each token at bucket 256; by the released script's method", sizes, "2.2"
    peaks = ", ".join(f"{preparing[f'peak_mb_x{copies}']:.0f}" for copies in (1, 4, 16))
    yield "", "peak memory with 1, 4 and 16 times the text", f"{peaks} MB", "within 10%"

    buckets = loading["rows"]
    ratios = ", ".join(f"{row['ours_tokens_per_s'] / row['webdataset_tokens_per_s']:.2f}" for row in buckets)
    about = f"buckets {buckets[0]['bucket']:,} to {buckets[-1]['bucket']:,}"
    beside = "those of plain webdataset, which does not shuffle"
    yield "`benchmarks/loader.py`", f"tokens/s of one process over {beside}; {about}", ratios, "1.0"
    rates = ", ".join(f"{row['ours_tokens_per_s'] / 1e6:.0f}" for row in buckets)
    yield "", "million tokens/s of one process", rates, ""
    yield "", "time to resume at step 10^6", f"{loading['resume_s']:.1f} s", "1 s"
    waits = ", ".join(f"{loading[name]:.2f}" for name in ("wait_ms_median", "wait_ms_p99"))
    yield "", "wait of a model that takes 20 ms for each micro-batch, median and 99th percentile", f"{waits} ms", ""

    shortest, *_, longest = training["rows"]
    trained = f"tokens/s over a curriculum of {shortest['bucket']:,} to {longest['bucket']:,}"
    chunks = f"those of concat-and-chunk at {longest['bucket']:,}"
    found = f"{training['speed_up']:.2f}", f"{training['predicted']:.2f} predicted"
    yield "`benchmarks/variable_length.py`", f"{trained}, over {chunks}", *found
    for row in training["rows"]:
        found = f"{row['concat_is']:.2f}", f"{row['predicted']:.2f} predicted"
        yield "", f"the same for steps of bucket {row['bucket']:,} alone", *found


def kinds(record: Any) -> Iterator[Cells]:
    """Yield the rates of preparation by kind of corpus, beside the tokenizer alone."""
    rows = {(row["content"], row["kind"]): row for row in record["rows"]}
    shown = [
        ("text", "a.jsonl", "text as json"),
        ("text", "a.jsonl.gz", "text as json .gz"),
        ("text", "a.csv", "text as csv"),
        ("text", "text", "text in files"),
        ("text", "a.parquet", "text as parquet"),
        ("text", "a.arrow", "text as arrow"),
        ("text", "a.tar", "text as webdataset"),
        ("text", "disk", "text on disk"),
        ("ids", "tokens", "token ids, tokens"),
        ("ids", "megatron", "token ids, megatron"),
        ("ids", "disk, rows of a stream", "token ids, rows of a stream on disk"),
        ("ids", "parquet", "token ids, parquet"),
        ("ids", "webdataset", "token ids, webdataset"),
        ("ids", "json", "token ids, json"),
    ]
    for content, kind, name in shown:
        row = rows[content, kind]
        over = row["over_bare"]
        yield name, f"{row['tokens_per_s'] / 1e3:,.0f}", f"{over:.2f}" if over < 10 else f"{over:.1f}"


def readers(record: Any) -> Iterator[Cells]:
    """Yield the million tokens/s of LongRing's reader and of others, by bucket."""
    for row in record["rows"]:
        own = [row[f"{name}_tokens_per_s"] for name in ("ours", "webdataset_rows")]
        peers = [row["peers"][name] for name in ("megatron-core", "ai2-olmo-core", "mosaicml-streaming", "torchtitan")]
        yield f"{row['bucket']:,}", *(f"{rate / 1e6:,.0f}" for rate in (*own, *peers))


def odd_documents(record: Any) -> Iterator[Cells]:
    """Yield the time of ordinary documents over that of one odd document, and its memory."""
    names = {"ordinary": "ordinary text", "one word of random letters": "random letters"}
    for row in record["rows"]:
        if row["documents"] == 1:
            size = ", 1 GB" if row["mb"] > 1e3 else ""
            yield f"{names.get(row['kind'], row['kind'])}{size}", f"{row['ordinary_is']:.2f}", f"{row['peak_mb']:,.0f}"


LEDGERS: dict[str, list[tuple[str, str, int]]] = {
    "prolong-64k": [
        ("repositories", "repositories", 0),
        ("repositories at 65,536", "repositories", 65_536),
        ("books", "books", 0),
        ("books at 65,536", "books", 65_536),
        ("tulu", "tulu", 0),
    ],
    "prolong-512k": [
        ("repositories at 524,288", "repositories", 524_288),
        ("repositories at 65,536", "repositories", 65_536),
        ("books at 524,288", "books", 524_288),
        ("books at 65,536", "books", 65_536),
        ("all sources at 131,072", "", 131_072),
        ("all sources at 262,144", "", 262_144),
    ],
    "olmo-3-7b-64k": [
        ("papers, the middle three fifths", "pdf.1", 0),
        ("papers, the fifth of lowest score", "pdf.0", 0),
        ("papers, the fifth of highest score", "pdf.2", 0),
        ("mid-training mix", "midtraining", 0),
    ],
}
"""Name, source and bucket of the rows that are shown of each recipe; "" and 0 stand for all."""


def mixes(record: Any) -> Iterator[Cells]:
    """Yield the ledgers of published mixes: shares of the data, asked and given, passes, tokens left in millions."""
    for recipe, shown in LEDGERS.items():
        yield f"**{recipe}**", *[""] * 6
        for name, source, bucket in shown:
            cells = [
                row
                for row in record["rows"]
                if row["recipe"] == recipe and source in ("", row["source"]) and bucket in (0, row["bucket"])
            ]
            of_data, given, read, repeated, never = (
                sum(cell[column] for cell in cells)
                for column in ("of_the_data", "given", "read_tokens", "repeated_tokens", "never_reached_tokens")
            )
            asked = cells[0]["asked" if bucket else "asked_of_source"]
            passes = read / (read - repeated + never)
            shares = f"{of_data:.1%}", "" if asked is None else f"{100 * asked:g}%", f"{given:.1%}", f"{passes:.2f}"
            yield name, *shares, *(f"{tokens / 1e6:.1f}M" if tokens else "0" for tokens in (repeated, never))


def length_degrees(record: Any) -> Iterator[Cells]:
    """Yield tokens/s with a degree for each bucket, and the times of other ways over its."""
    for row in record["rows"]:
        sizes = f"{row['longest']:,}", f"{row['gpus']:,}", f"{row['micro_batches']}"
        names = ("zigzag", "balanced", "step", "sorted", "alike", "solver", "bound")
        ratios = [f"{row['over_bucket'][name]:.2f}" for name in names]
        yield row["mix"], *sizes, f"{row['tokens_per_s']['bucket'] / 1e6:.2f}", *ratios


def lengths_measured(record: Any) -> Iterator[Cells]:
    """Yield a layer's attention on the lab network, and attention with the rest of the layer, over LongRing's."""
    for row in record["rows"]:
        ratios = [f"{row[f'{of}_over_bucket']:.2f}" for of in ("attention", "simulated", "layer")]
        degrees = ", ".join(f"{count} over {size}" for size, count in row["degrees"])
        yield row["mix"], f"{row['replicas']}", row["member"], degrees, f"{row['attention_s']:.1f} s", *ratios


def orders(record: Any) -> Iterator[Cells]:
    """Yield each method's order of documents, with its time over that of the released loop."""
    for row in record:
        [released] = [
            other["seconds"]
            for other in record
            if other["documents"] == row["documents"] and other["method"] == "released"
        ]
        cells = f"{row['seconds']:.2f}", f"{row['seconds'] / released:.2f}", f"{row['peak_mb']:,.0f}"
        yield f"{row['documents']:,}", row["method"], *cells, f"{row['jumps']:,}", f"{row['mean_similarity']:.3f}"


def related(encoder: str, *columns: str) -> Callable[[Any], Iterator[Cells]]:
    """Return a function that yields how related the documents of one context are, by corpus and order."""
    formats = {"context_documents": "{:.1f}", "one_package": "{:.1%}", "inside": "{:.3f}", "across": "{:.3f}"}

    def rows(record: Any) -> Iterator[Cells]:
        for corpus, found in record[encoder].items():
            for row, about in zip(found, about_corpus(corpus, found[0], encoder), strict=True):
                yield (
                    about,
                    row["by"],
                    *("" if row[name] is None else formats[name].format(row[name]) for name in columns),
                )

    return rows


def about_corpus(corpus: str, row: Row, encoder: str) -> Cells:
    """Return what the first column says of a corpus, in the lines of its three orders."""
    dropped = f"{row['near_duplicates']} near-duplicates dropped, threshold {row['threshold']}"
    if encoder != "default":
        return (f"standard library, {dropped}" if corpus == "stdlib" else "WikiText-2's validation split"), "", ""
    if corpus == "stdlib":
        return "Python's standard library, contexts of 32,768", f"{row['documents']:,} documents, {dropped}", ""
    return "WikiText-2's validation split, contexts of 16,384", f"{row['documents']} articles, no near-duplicates", ""


def related_training(record: Any) -> Iterator[Cells]:
    """Yield held-out losses of a small model by the order of its contexts: mean and standard deviation of the seeds."""
    for arm in dict.fromkeys(row["arm"] for row in record["rows"]):
        mine = [row for row in record["rows"] if row["arm"] == arm]
        values = ([row[name] for row in mine] for name in ("loss", "package_seen", "other_before", "gain"))
        positions = ", ".join(
            f"{mean(row['by_position'][part] for row in mine):.3f}" for part in mine[0]["by_position"]
        )
        yield arm, *(f"{mean(of_seeds):.4f} ± {stdev(of_seeds):.4f}" for of_seeds in values), positions


def stages(record: Any) -> Iterator[Cells]:
    """Yield the rates of the stages of `longring order` that scale with documents."""
    for row in record["stages"]:
        if row["stage"] in ("documents", "embed", "duplicates", "lay", "contexts"):
            yield row["stage"], f"{row['documents_per_s']:,.0f}", f"{row['tokens_per_s']:,.0f}"


RELATED = "related_orders_2026-11-21"
TABLES = [
    Table(
        "data.md",
        "| command | measured |",
        data_path,
        ("prepare_1_core_2026-11-23", "loader_2_cores_2026-11-23", "variable_length_2_cores_2026-11-23"),
    ),
    Table("data.md", "| kind | thousand tokens/s |", kinds, ("prepare_kinds_2_cores_2026-11-22",)),
    Table("data.md", "| bucket | LongRing |", readers, ("loader_peers_2_cores_2026-11-23",)),
    Table("data.md", "| one document of 34 MB |", odd_documents, ("prepare_odd_1_core_2026-11-22",)),
    Table("mixes.md", "| | of the data | asked |", mixes, ("published_mixes_2026-11-22",)),
    Table("mixes.md", "| mix | longest | GPUs |", length_degrees, ("length_degrees_2026-11-23",)),
    Table("mixes.md", "| mix, 8 ranks | replicas |", lengths_measured, ("length_degrees_network_2_cores_2026-11-23",)),
    Table("ordering.md", "| documents | method | seconds |", orders, ("order_1_core_2026-11-21",)),
    Table(
        "ordering.md",
        "| corpus | order | documents a context |",
        related("default", "context_documents", "one_package", "inside", "across"),
        (RELATED,),
    ),
    Table(
        "ordering.md",
        "| corpus | order | of one package |",
        related("all-MiniLM-L6-v2, head", "one_package", "inside", "across"),
        (RELATED,),
    ),
    Table(
        "ordering.md",
        "| trained on | all |",
        related_training,
        ("related_training_2_cores_2026-11-23",),
    ),
    Table("ordering.md", "| stage | documents/s |", stages, ("order_rates_1_core_2026-11-21",)),
]
