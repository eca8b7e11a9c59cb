"""Encoders: hashed n-grams against scikit-learn, models against transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lanes import by_lane
from longring.data.config import DataConfig
from longring.data.order import embed
from longring.data.order.documents import Documents, write_tables
from longring.data.order.stages import order
from longring.data.order_config import OrderConfig
from longring.data.prepare.prepare import prepare
from rich.console import Console
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

Words = Callable[..., str]


@pytest.fixture
def documents(make_config: Callable[..., DataConfig], words: Words, tmp_path: Path) -> Documents:
    texts = [words(3 + 17 * (number % 9), number) for number in range(40)]
    config = make_config(texts, rest="pack", min_bucket_tokens=16, held_out_fraction=0.1)
    prepare(config, Console(quiet=True))
    found = Documents(config.directory, tmp_path / "tables")
    for number in range(found.num_shards):
        write_tables(found.manifest, tmp_path / "tables", number)
    return found


def encoded(encoder: embed.Encoder, documents: Documents) -> np.ndarray:
    return np.concatenate(list(encoder.encode(documents, range(len(documents)))))


@pytest.mark.parametrize(
    ("long_documents", "window"),
    by_lane([("windows", 10_000), ("windows", 25), ("head", 25)], quick=[("windows", 10_000)], slow=[("windows", 25)]),
)
def test_default_is_tf_idf_and_svd_of_token_n_grams(
    documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_documents: str, window: int
):
    """Cosines equal those of scikit-learn's vectorizer on words that stand for tokens.

    There are as many dimensions as documents, so the SVD keeps everything, and no two features have the same hash.
    """
    monkeypatch.setattr(embed, "BATCH_TOKENS", 300)
    config = OrderConfig(embedding_dimensions=200, window_tokens=window, long_documents=long_documents)  # type: ignore[arg-type]
    embed.fit(documents, np.flatnonzero(~documents.column("held_out")), config, tmp_path / "encoder.npz")
    found = encoded(embed.make_encoder(config, tmp_path / "encoder.npz", 0), documents)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    windows, owners = [], []
    for number in range(len(documents)):
        tokens = [f"t{token}" for token in documents.tokens(number)[1:-1].tolist()]
        cuts = [tokens[start : start + window] for start in range(0, len(tokens), window)]
        for cut in cuts[: 1 if long_documents == "head" else None]:
            windows.append(" ".join(cut))
            owners.append(number)
    train = ~documents.column("held_out")[owners]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, norm=None, token_pattern=r"\S+")  # type: ignore[arg-type]
    vectorizer.fit([text for text, chosen in zip(windows, train, strict=True) if chosen])
    weights = vectorizer.transform(windows)
    # sublinear_tf in TfidfVectorizer is 1 + log(count), times idf; then unit length, before the SVD is fitted.
    normed = weights.multiply(1 / np.sqrt(weights.multiply(weights).sum(axis=1))).tocsr()
    reducing = TruncatedSVD(min(200, int(train.sum())), n_iter=4, random_state=0).fit(normed[train])
    assert reducing.components_ is not None
    sums = np.zeros((len(documents), reducing.components_.shape[0]))
    np.add.at(sums, owners, embed.unit(reducing.transform(weights)))  # type: ignore[arg-type]
    expected = embed.unit(sums)  # type: ignore[arg-type]
    assert np.abs(found @ found.T - expected @ expected.T).max() < 0.05


def test_every_window_weighs_the_same():
    windows = np.array([[3, 0], [0, 1], [0, 5], [1, 0]], dtype=np.float32)
    found = embed._averaged(windows, np.array([0, 0, 1, 2]), 4)
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [0, 1], [1, 0], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("long_documents", ["windows", "head"])
def test_vectors_of_a_model_do_not_depend_on_batches(
    documents: Documents, bert: Path, monkeypatch: pytest.MonkeyPatch, long_documents: str
):
    config = OrderConfig(encoder=str(bert), long_documents=long_documents)  # type: ignore[arg-type]
    found = encoded(embed.make_encoder(config, Path("unused"), 0), documents)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    monkeypatch.setattr(embed, "BATCH_TOKENS", 100)
    monkeypatch.setattr(embed, "BATCH_WINDOWS", 1)
    alone = encoded(embed.make_encoder(config, Path("unused"), 0), documents)
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_unknown_documents_have_the_zero_vector():
    assert embed.unit(np.array([[0, 0], [3, 4]], dtype=np.float32)).tolist() == [
        [0, 0],
        [np.float32(0.6), np.float32(0.8)],
    ]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a randomly initialized encoder with 16 positions, in the format of Hugging Face."""
    folder = tmp_path_factory.mktemp("bert")
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789äöü"))
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters])}
    tokenizer = Tokenizer(
        models.WordPiece(vocabulary | {f"##{letter}": 50 + i for i, letter in enumerate(letters)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.model_max_length = 16
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertModel(config).eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("long_documents", ["windows", "head"])
def test_any_hugging_face_encoder_by_mean_pooling(documents: Documents, bert: Path, long_documents: str):
    """Vectors equal the mean last hidden state of the model on each encoder window, by transformers alone."""
    config = OrderConfig(encoder=str(bert), long_documents=long_documents)  # type: ignore[arg-type]
    found = encoded(embed.make_encoder(config, Path("unused"), 0), documents)
    assert found.shape == (len(documents), 16)
    model, tokenizer = BertModel.from_pretrained(bert).eval(), PreTrainedTokenizerFast.from_pretrained(bert)
    limit = 16 - tokenizer.num_special_tokens_to_add()
    for number, text in enumerate(documents.texts(range(8))):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        total = np.zeros(16)
        for start in range(0, len(ids) if long_documents == "windows" else 1, limit):
            window = [tokenizer.cls_token_id, *ids[start : start + limit], tokenizer.sep_token_id][: limit + 2]
            window = window if limit < 16 else window[1:-1]
            with torch.no_grad():
                state = model(torch.tensor([window])).last_hidden_state[0].mean(0).double().numpy()
            total += state / np.linalg.norm(state)
        # A word cut in two by a window begins anew in the second: its pieces are then others.
        assert found[number] @ total / np.linalg.norm(total) > 0.99


def test_an_encoder_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"order\.encoder = .*nothing-here': cannot be loaded"):
        embed.make_encoder(OrderConfig(encoder=str(tmp_path / "nothing-here")), Path("unused"), 0)


@pytest.mark.slow
def test_order_with_an_encoder_is_the_same_for_any_number_of_workers(
    make_config: Callable[..., DataConfig], words: Words, tmp_path: Path, bert: Path
):
    texts = [words(5 + 7 * (number % 9), number) for number in range(30)]
    config = make_config([], rest="pack", min_bucket_tokens=16)
    for part in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[part::3]]
        (tmp_path / f"part{part}.jsonl").write_text("".join(lines))
    Path(config.source.path).unlink()
    config = type(config)(
        **{
            **vars(config),
            "source": type(config.source)(kind="json", path=str(tmp_path / "part*.jsonl")),
            "input_shard_bytes": 1,
        }
    )
    prepare(config, Console(quiet=True))
    found = []
    for workers in (1, 2):
        directory = tmp_path / f"ordered{workers}"
        settings = OrderConfig(
            mode="in_context",
            directory=str(directory),
            work_directory=str(tmp_path / f"work{workers}"),
            encoder=str(bert),
            neighbors=4,
        )
        order(config, settings, Console(quiet=True), workers=workers)
        found.append({file.name: file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()})
    assert found[0] == found[1]
