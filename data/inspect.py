"""A look into a prepared directory: its books, its buckets, its hashes and how its sequences read."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .decompose import SPLITS
from .manifest import Manifest, open_prepared

SAMPLE_TOKENS = 48


def inspect(directory: str | Path, console: Console) -> None:
    """Print the prepared data's ledger, buckets and two beginnings of sequences, after checking every SHA-256.

    Raises ValueError, as `open_prepared` and `Manifest.verify` do, for data that is not what its manifest says.
    """
    directory = Path(directory)
    manifest = open_prepared(directory)
    manifest.verify(directory)
    shards = [shard for split in SPLITS for bucket in manifest.splits[split] for shard in bucket.shards]
    size_bytes = sum(shard.size_bytes for shard in shards)
    console.print(manifest.ledger.table())
    console.print(_bucket_table(manifest))
    console.print(f"{len(shards):,} shards, {size_bytes / 1e6:,.1f} MB: every SHA-256 is the manifest's")
    _print_samples(directory, manifest, console)


def _bucket_table(manifest: Manifest) -> Table:
    table = Table(title="Buckets", title_justify="left")
    for column in ("length", "train sequences", "train tokens", "of tokens", "held-out sequences", "held-out tokens"):
        table.add_column(column, justify="right")
    train, held_out = manifest.splits["train"], manifest.splits["held_out"]
    train_tokens = sum(bucket.tokens for bucket in train)
    for ours, theirs in zip(train, held_out, strict=True):
        counts = (ours.sequences, ours.tokens, ours.tokens / train_tokens, theirs.sequences, theirs.tokens)
        formats = (",", ",", ".1%", ",", ",")
        table.add_row(f"{ours.length:,}", *(format(*pair) for pair in zip(counts, formats, strict=True)))
    # A token at place i of its sequence sees i earlier ones (arXiv 2405.13226, appendix F).
    context = sum(bucket.sequences * bucket.length * (bucket.length - 1) / 2 for bucket in train) / train_tokens
    table.caption = f"a train token sees {context:,.0f} earlier tokens on average"
    table.caption_justify = "left"
    return table


def _print_samples(directory: Path, manifest: Manifest, console: Console) -> None:
    tokenizer = manifest.tokenizer(directory).tokenizer
    filled = [bucket for bucket in manifest.splits["train"] if bucket.sequences]
    for bucket in {filled[0].length: filled[0], filled[-1].length: filled[-1]}.values():
        reader = manifest.reader(directory, bucket)
        document, offset = reader.documents([0])[0]
        text = tokenizer.decode(reader.read([0])[0, :SAMPLE_TOKENS].tolist(), skip_special_tokens=False)
        console.print(f"\n[bold]{bucket.length:,} tokens of document {document}, from its token {offset}[/bold]")
        console.print(escape(text), highlight=False)
