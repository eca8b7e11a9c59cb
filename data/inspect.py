"""A look into a prepared directory: its books, its hashes and how its sequences read."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .decompose import SPLITS
from .manifest import Manifest, open_prepared

SAMPLE_TOKENS = 48


def inspect(directory: str | Path, console: Console) -> None:
    """Print the prepared data's ledger and two beginnings of sequences, after checking every SHA-256.

    Raises ValueError, as `open_prepared` and `Manifest.verify` do, for data that is not what its manifest says.
    """
    directory = Path(directory)
    manifest = open_prepared(directory)
    manifest.verify(directory)
    shards = [shard for split in SPLITS for bucket in manifest.splits[split] for shard in bucket.shards]
    size_bytes = sum(shard.size_bytes for shard in shards)
    console.print(manifest.ledger.table())
    train = manifest.splits["train"]
    # A token at place i of its sequence sees i earlier ones (arXiv 2405.13226, appendix F).
    seen = sum(bucket.sequences * bucket.length * (bucket.length - 1) / 2 for bucket in train)
    console.print(f"a train token sees {seen / sum(bucket.tokens for bucket in train):,.0f} earlier tokens on average")
    console.print(f"{len(shards):,} shards, {size_bytes / 1e6:,.1f} MB: every SHA-256 is the manifest's")
    _print_samples(directory, manifest, console)


def _print_samples(directory: Path, manifest: Manifest, console: Console) -> None:
    tokenizer = manifest.tokenizer(directory).tokenizer
    filled = [bucket for bucket in manifest.splits["train"] if bucket.sequences]
    for bucket in {filled[0].length: filled[0], filled[-1].length: filled[-1]}.values():
        reader = manifest.reader(directory, bucket)
        document, offset = reader.documents([0])[0]
        text = tokenizer.decode(reader.read([0])[0, :SAMPLE_TOKENS].tolist(), skip_special_tokens=False)
        console.print(f"\n[bold]{bucket.length:,} tokens of document {document}, from its token {offset}[/bold]")
        console.print(escape(text), highlight=False)
