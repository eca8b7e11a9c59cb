"""`longring inspect`: the ledger, lengths, hashes and samples of prepared data, and a curriculum over it."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from ..config import LoaderConfig
from ..curriculum_config import CurriculumConfig
from ..format.bucket import Bucket
from ..format.manifest import Manifest
from ..read.batch_order import BatchOrder
from ..read.mix import training_order
from .cost import ModelSize, attention_share, speed_up
from .ledger import print_ledgers
from .mix import mix_tables
from .ordered import show_order
from .tables import bar, make_table

SAMPLE_TOKENS = 48
"""Number of tokens of a sequence that are printed."""

SAMPLED_SEQUENCES = 256
"""Number of sequences from which the average context of a bucket with document boundaries is measured."""

PARTS = 10
"""Number of equal parts of a run in which the curriculum is shown."""

BAR = 20
"""Characters of the longest bar."""


def inspect(
    manifest: Manifest,
    console: Console,
    *,
    curriculum: CurriculumConfig,
    loader: LoaderConfig,
    model: ModelSize,
    steps: int,
    seed: int,
    global_batch_tokens: int = 0,
) -> Path:
    """Check every SHA-256, print tables of the data, draw it, and return the path of the picture.

    The tables include `steps` steps of `curriculum` with the seed `seed`, and their FLOPs for `model`.
    `global_batch_tokens` are the tokens of a step; 0: 64 sequences of the longest bucket in use. Raises ValueError if
    the data is not what its manifest says (see `Manifest.verify`).
    """
    from .picture import draw  # the import of matplotlib takes a second

    _verify(manifest, console)
    train = manifest.buckets("train")
    print_ledgers(manifest, console)
    console.print(_document_table(manifest))
    console.print(_bucket_table(manifest, train, model))
    # The same function as in training: the tables show the steps that a run would take.
    batch = global_batch_tokens or 64 * max(curriculum.lengths_in_use(manifest.lengths))
    order = training_order(manifest, curriculum, loader, steps=steps, global_batch_tokens=batch, seed=seed)
    console.print(_curriculum_table(order, curriculum))
    for mixed in mix_tables(order, curriculum):
        console.print(mixed)
    _print_cost(order, model, console)
    _print_samples(manifest, train, console)
    if manifest.order is not None:
        show_order(manifest, console)
    # The picture lies beside a local directory; that of a remote one, in the working directory.
    name = manifest.store.name.rstrip("/").rpartition("/")[2] if "://" in manifest.store.name else manifest.store.name
    picture = Path(f"{name}.png")
    draw(manifest, order, picture)
    console.print(f"\npicture: {picture}", soft_wrap=True)
    return picture


def _verify(manifest: Manifest, console: Console) -> None:
    """Compare every file with its SHA-256 and print the size of the shards."""
    size_bytes = int(manifest.shards["size_bytes"].sum())
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checking every SHA-256", total=size_bytes)
        for done in manifest.verify():
            progress.update(task, completed=done)
    written = sum(split.sequence_tokens() for split in manifest.ledger.splits.values())
    console.print(
        f"{len(manifest.shards):,} shards, {size_bytes / 1e6:,.1f} MB, {size_bytes / max(written, 1):.2f} bytes a "
        "token: every SHA-256 is the manifest's"
    )


def _document_table(manifest: Manifest) -> Table:
    """Return the documents of both splits by powers of two of their tokens."""
    table = make_table("Documents by length", "tokens", "documents", "tokens in them", "share", "")
    splits = list(manifest.ledger.splits.values())
    total = max(manifest.ledger.tokens, 1)
    for power in sorted(set().union(*(split.document_lengths for split in splits))):
        documents = sum(split.document_lengths[power] for split in splits)
        tokens = sum(split.length_tokens[power] for split in splits)
        share = tokens / total
        table.add_row(f"≥ {1 << power:,}", f"{documents:,}", f"{tokens:,}", f"{share:.1%}", bar(share, BAR))
    return table


def _bucket_table(manifest: Manifest, train: tuple[Bucket, ...], model: ModelSize) -> Table:
    """Return the buckets of the train split, and its sources if there are several."""
    table = make_table("Train split", "bucket", "sequences", "tokens", "share", "sees", "attention")
    total = sum(bucket.tokens for bucket in train)
    for bucket in train:
        sees = f"{average_context(manifest, bucket):,.0f}" if bucket.sequences else ""
        share = attention_share(model, [1], [bucket.length])
        numbers = (f"{bucket.sequences:,}", f"{bucket.tokens:,}", f"{bucket.tokens / total:.1%}", sees, f"{share:.1%}")
        table.add_row(f"{bucket.length:,}", *numbers)
    if len(train[0].parts) > 1:  # every bucket has a part of each source
        table.add_section()
        for index, part in enumerate(train[0].parts):
            tokens = sum(bucket.length * bucket.parts[index].sequences for bucket in train)
            sequences = sum(bucket.parts[index].sequences for bucket in train)
            table.add_row(part.source, f"{sequences:,}", f"{tokens:,}", f"{tokens / total:.1%}", "", "")
    average = sum(average_context(manifest, bucket) * bucket.tokens for bucket in train if bucket.sequences) / total
    table.caption = (
        f"A train token sees {average:,.0f} earlier tokens on average.\n"
        f"attention: its share of the FLOPs in a model of {model.name}."
    )
    return table


def average_context(manifest: Manifest, bucket: Bucket) -> float:
    """Return the mean number of earlier tokens that a token of the bucket sees (arXiv 2405.13226, appendix F).

    Token i of a piece sees i of them. With document boundaries the mean is over SAMPLED_SEQUENCES sequences, evenly
    spaced.
    """
    if not manifest.has_boundaries:
        return (bucket.length - 1) / 2
    numbers = np.unique(np.linspace(0, bucket.sequences - 1, SAMPLED_SEQUENCES).astype(np.int64))
    # [pieces]: the number of tokens of each. The n tokens of a piece see 0 + 1 + ... + (n - 1) tokens in all.
    sizes = np.concatenate(
        [np.diff([*starts, bucket.length]) for starts in manifest.reader(bucket).document_starts(numbers)]
    )
    return float((sizes * (sizes - 1) / 2).sum() / sizes.sum())


def _curriculum_table(order: BatchOrder, curriculum: CurriculumConfig) -> Table:
    """Return the share of each bucket in the tokens of each tenth of a run, in percent."""
    odds = curriculum.odds if isinstance(curriculum.odds, str) else ", ".join(f"{value:g}" for value in curriculum.odds)
    cycles = curriculum.num_cycles(len(order.lengths), *order.slots.shape)  # (steps, slots of a step)
    title = f"Curriculum: {len(order.slots):,} steps of {odds} in {cycles} cycles, % of each tenth"
    table = make_table(title, "bucket", "tokens", *(str(part + 1) for part in range(PARTS)))
    for bucket, length in enumerate(order.lengths):
        # [PARTS]; in a run of fewer steps, some parts are empty.
        shares = [np.mean(part == bucket) if len(part) else 0 for part in np.array_split(order.slots, PARTS)]
        cells = (f"{share:.0%}".rstrip("%") if share else "·" for share in shares)
        table.add_row(f"{length:,}", f"{np.mean(order.slots == bucket):.1%}", *cells)
    return table


def _print_cost(order: BatchOrder, model: ModelSize, console: Console) -> None:
    """Print attention's share of the FLOPs of an order's steps, and the speed-up over one length."""
    # [buckets]. All slots have the same number of tokens, so slots stand for tokens.
    slots = order.slots_before(len(order.slots) + 1).tolist()
    console.print(
        f"Attention is {attention_share(model, slots, order.lengths):.1%} of the FLOPs of these steps. "
        f"Concat-and-chunk of as many tokens at {max(order.lengths):,} takes "
        f"{speed_up(model, slots, order.lengths):.2f} times the FLOPs.",
        highlight=False,
    )


def _print_samples(manifest: Manifest, train: tuple[Bucket, ...], console: Console) -> None:
    """Print the beginning of the first sequence of the shortest and of the longest bucket."""
    tokenizer = manifest.tokenizer()
    filled = [bucket for bucket in train if bucket.sequences]
    # A dict by length prints a bucket once if it is both the shortest and the longest.
    for bucket in {filled[0].length: filled[0], filled[-1].length: filled[-1]}.values():
        reader = manifest.reader(bucket)
        input_shard, record, offset, _ = reader.pieces([0])[0][0].tolist()  # the first piece
        text = tokenizer.decode(reader.read([0])[0, :SAMPLE_TOKENS].tolist())
        origin = escape(manifest.origin(input_shard, record))
        console.print(f"\n[bold]{bucket.length:,} tokens, from token {offset:,} of {origin}[/bold]")
        console.print(escape(text), highlight=False)
