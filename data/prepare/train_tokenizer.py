"""Tokenizer of a preparation: an existing one, or a byte-level BPE trained on the documents."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..config import DataConfig, TokenizerConfig
from ..format.document import Document
from ..format.names import MAX_BYTES
from ..format.spans import SPAN_CHARACTERS, breaks
from ..format.tokenizer import TOKENIZER_FILE, knot_tokens
from ..format.tokenizer_file import check_speed, load_tokenizer
from .decompose import split_of
from .records import RecordReader
from .sources import InputShard

TRAINING_CHARACTERS = 1 << 12
"""Maximum number of characters that a tokenizer is trained on as one text, and so of a word: training takes time in
proportion to the square of a word's length."""


def make_tokenizer(config: DataConfig, inputs: list[InputShard], progress: Progress) -> bytes:
    """Return the `tokenizer.json` of `config`: the existing one, or one trained on the train split of `inputs`.

    Raises ValueError if `data.tokenizer.path` is not a file, may not be used (format/tokenizer_file.py) or is slow, or
    if a source cannot be read.
    """
    if config.tokenizer.path:
        content = read_tokenizer(config.tokenizer.path)
        check_speed(load_tokenizer(content, named(config.tokenizer)), named(config.tokenizer), SPAN_CHARACTERS)
        return with_knot_tokens(content, config.tokenizer.knot_chunks, named(config.tokenizer))
    task = progress.add_task("training the tokenizer", total=None, line="")
    texts = _training_texts(config, inputs, lambda: progress.advance(task))
    content = train_tokenizer(texts, config.tokenizer)
    progress.update(task, total=progress.tasks[task].completed)
    return content


def _training_texts(config: DataConfig, inputs: list[InputShard], read: Callable[[], object]) -> Iterator[str]:
    """Yield the train documents of each source, up to `training_characters` of it; call `read` for every document."""
    for source in config.named_sources:
        left = config.tokenizer.training_characters
        for document in _documents(config, source, inputs):
            read()
            if split_of(document.digest, config.seed, config.held_out_fraction) == "train":
                assert isinstance(document.content, str), "a source of token ids comes with its tokenizer"
                yield document.content
                left -= len(document.content)
            if left <= 0:
                break


def _documents(config: DataConfig, source: str, inputs: list[InputShard]) -> Iterator[Document]:
    for shard in inputs:
        if shard.recipe_source == source and not shard.bin:  # one input shard reads the records of all bins
            every = replace(shard, bin=None)
            yield from RecordReader(every, config.named_sources[source], config.max_bad_fraction).documents()


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Return the `tokenizer.json` of a byte-level BPE trained on `texts`; equal texts give equal bytes.

    Text is not normalized and every byte is in the alphabet, so that any text is encoded without loss.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.boundary, *knot_tokens(config.knot_chunks)],
        # Sorted, as the library gives the alphabet in another order each time.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    short = (part for text in texts for part in _short_parts(text))
    tokenizer.train_from_iterator(short, trainer=trainer)
    return tokenizer.to_str(pretty=True).encode()


def _short_parts(text: str) -> Iterator[str]:
    """Yield adjacent parts of `text`, of at most TRAINING_CHARACTERS, that begin before white space if there is any.

    The pre-tokenizer of `train_tokenizer` never joins a word to the white space after it, so the words of all parts are
    those of `text`, but for longer ones.
    """
    start = 0
    while len(text) - start > TRAINING_CHARACTERS:
        limit = start + TRAINING_CHARACTERS
        stop = next(breaks(text, start, limit), limit)
        yield text[start:stop]
        start = stop
    yield text[start:]


def read_tokenizer(path: str) -> bytes:
    """Return the content of `data.tokenizer.path`, a `tokenizer.json` or a directory with one.

    Raises ValueError if there is no such file, or if it is larger than prepared data may have.
    """
    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(
            f"data.tokenizer.path = {path!r}: {file} does not exist; name a tokenizer.json or a directory with one, "
            "or leave it empty to train one"
        )
    limit = MAX_BYTES[TOKENIZER_FILE]
    with file.open("rb") as stream:
        content = stream.read(limit + 1)  # one byte more tells a file that is too large
    if len(content) > limit:
        raise ValueError(
            f"data.tokenizer.path = {path!r}: {file} has more than {limit:,} bytes; name another, or leave it empty to "
            "train one"
        )
    return content


def named(config: TokenizerConfig) -> str:
    """Return the name of the tokenizer for messages."""
    return f"data.tokenizer.path = {config.path!r}" if config.path else TOKENIZER_FILE


def with_knot_tokens(content: bytes, max_chunks: int, file: str = TOKENIZER_FILE) -> bytes:
    """Return the `tokenizer.json` `content` with the special tokens of `max_chunks` knot chunks that it lacks.

    Raises ValueError, which names `file`, if it may not be used (format/tokenizer_file.py).
    """
    if max_chunks < 2:
        return content
    tokenizer = load_tokenizer(content, file)
    tokenizer.add_special_tokens([name for name in knot_tokens(max_chunks) if tokenizer.token_to_id(name) is None])
    return tokenizer.to_str(pretty=True).encode()
