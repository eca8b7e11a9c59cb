"""Tokenizer of a preparation: an existing one, or a byte-level BPE trained on the documents."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..config import DataConfig, TokenizerConfig
from ..format.document import Document
from ..format.tokenizer import TOKENIZER_FILE, knot_tokens
from .decompose import split_of
from .records import RecordReader
from .sources import InputShard


def make_tokenizer(config: DataConfig, inputs: list[InputShard], progress: Progress) -> bytes:
    """Return the `tokenizer.json` of `config`: the existing one, or one trained on the train split of `inputs`.

    Raises ValueError if `data.tokenizer.path` is not a file or if a source cannot be read.
    """
    if config.tokenizer.path:
        return with_knot_tokens(read_tokenizer(config.tokenizer.path), config.tokenizer.knot_chunks)
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
        if shard.source == source:
            yield from RecordReader(shard, config.named_sources[source], config.max_bad_fraction).documents()


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Return the `tokenizer.json` of a byte-level BPE trained on `texts`; equal texts give equal bytes.

    Text is not normalised and every byte is in the alphabet, so that any text is encoded without loss.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.boundary, *knot_tokens(config.knot_chunks)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer.to_str(pretty=True).encode()


def read_tokenizer(path: str) -> bytes:
    """Return the content of `data.tokenizer.path`, a `tokenizer.json` or a directory with one.

    Raises ValueError if there is no such file.
    """
    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(
            f"data.tokenizer.path = {path!r}: {file} does not exist; name a tokenizer.json or a directory with one, "
            "or leave it empty to train one"
        )
    return file.read_bytes()


def with_knot_tokens(content: bytes, max_chunks: int) -> bytes:
    """Return the `tokenizer.json` `content` with the special tokens of `max_chunks` knot chunks that it lacks."""
    if max_chunks < 2:
        return content
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.add_special_tokens([name for name in knot_tokens(max_chunks) if tokenizer.token_to_id(name) is None])
    return tokenizer.to_str(pretty=True).encode()
