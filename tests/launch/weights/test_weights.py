"""Weights in and out: a Hugging Face directory becomes a checkpoint and again itself, and a run becomes a model."""

from __future__ import annotations

import json
import math
import re
import resource
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.published import to_ours, write_model
from helpers.small_checkpoint import read_whole
from longring.data.format.manifest import open_prepared
from longring.launch import cli
from longring.launch.checkpoint import stored
from longring.launch.checkpoint.format import read_checkpoint_manifest
from longring.launch.config import Recipe, load_recipe
from longring.launch.evaluate import evaluate, evaluate_weights
from longring.launch.preflight import preflight
from longring.launch.run_directory import RunDirectory
from longring.launch.settings import from_tree
from longring.launch.train import train
from longring.launch.weights import give_out
from longring.launch.weights.bring_in import describe, import_weights
from longring.launch.weights.directory import ModelDirectory
from longring.launch.weights.give_out import export_weights
from longring.model.config import ModelConfig, RopeScaling
from longring.model.families.read import PublishedModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SIZES: dict[str, Any] = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": RopeScaling(kind="llama3", factor=8, original_tokens=8192)},
    "qwen2": {"qkv_bias": True, "tied_head": True},
    "olmo3": {
        **{"qk_norm": "projection", "norm_order": "after", "layer_pattern": ("window", "full"), "window_tokens": 8},
        "rope_scaling": RopeScaling(kind="yarn", factor=8, original_tokens=8192, full_layers_only=True),
    },
}


def published(family: str) -> PublishedModel:
    other = {"torch_dtype": "bfloat16", "eos_token_id": [1, 2]}
    config = ModelConfig(**SIZES, **CONFIGS[family])
    return PublishedModel(family=family, config=config, vocab_size=300, max_tokens=65_536, other=other)


def make_model(directory: Path, family: str = "llama", num_files: int = 1) -> dict[str, Tensor]:
    """Write a Hugging Face directory with files beside the weights; return its tensors."""
    tensors = write_model(directory, published(family), num_files)
    (directory / "tokenizer.json").write_text('{"some": "tokenizer"}')
    (directory / "generation_config.json").write_text('{"do_sample": true}')
    return tensors


def read_model(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_imported_is_exported_bit_by_bit(tmp_path, monkeypatch, family):
    tensors = make_model(tmp_path / "model", family, num_files=3)
    import_weights(tmp_path / "model", tmp_path / "run")
    monkeypatch.setattr(give_out, "SHARD_BYTES", 30_000)
    export_weights(RunDirectory(tmp_path / "run"), tmp_path / "again")
    found = read_model(tmp_path / "again")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert len(set(index["weight_map"].values())) > 2
    for file in set(index["weight_map"].values()):
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / "again" / file).values()) <= 30_000
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "again" / file)


def test_another_directory_has_another_hash(tmp_path):
    """Config, files, names, types and positions count; ranks compare the hash before they load."""
    hashes = set()
    for name, family, num_files in (("a", "llama", 1), ("b", "llama", 2), ("c", "qwen2", 1)):
        make_model(tmp_path / name, family, num_files)
        with ModelDirectory(tmp_path / name) as directory:
            hashes.add(directory.sha256)
    file = tmp_path / "a" / "model.safetensors"
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {**load_file(file), "model.norm.weight": torch.ones(32, dtype=dtype)}
        save_file(tensors, file, {"format": "pt"})
        with ModelDirectory(tmp_path / "a") as directory:
            hashes.add(directory.sha256)
    assert len(hashes) == 4  # the first change is of values alone


def test_imported_weights_are_a_checkpoint_after_no_step(tmp_path):
    tensors = make_model(tmp_path / "model")
    config = import_weights(tmp_path / "model", tmp_path / "run")
    manifest = read_checkpoint_manifest(tmp_path / "run" / "checkpoints" / "step-00000000")
    assert manifest.state.step == 0
    assert manifest.parameters["embedding.weight"].shape == (384, 32)
    assert manifest.parameters["blocks.2.attention.qkv.weight"].cut is None
    assert config.vocab_size == 300
    assert sum(math.prod(entry.shape) for entry in manifest.parameters.values()) == (
        sum(t.numel() for t in tensors.values()) + 2 * 84 * 32
    )


def test_the_described_model_is_that_of_the_weights(tmp_path):
    make_model(tmp_path / "model", "olmo3")
    config = import_weights(tmp_path / "model", tmp_path / "run")
    assert from_tree(ModelConfig, tomllib.loads(describe(config))["model"]) == config


@pytest.mark.full
def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    make_model(tmp_path / "model", "qwen2", num_files=2)
    tensors = {name: torch.ones_like(tensor) for name, tensor in read_model(tmp_path / "model").items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (model.get_input_embeddings().weight == 1).all()
    with ModelDirectory(tmp_path / "model") as directory:
        assert (stored.read_whole(directory, "embedding.weight")[:300] == 1).all()


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_a_directory_is_read_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    """Rows of q, k and v are interleaved, those of gate and up follow each other, and the vocabulary is padded."""
    tensors = make_model(tmp_path / "model", "qwen2", num_files=2)
    monkeypatch.setattr(stored, "READ_ELEMENTS", block)
    with ModelDirectory(tmp_path / "model") as directory:
        for name, weight in directory.weights.items():
            assert stored.read_whole(directory, name).equal(to_ours(weight, tensors).float())


def test_a_dtype_may_be_chosen(tmp_path):
    tensors = make_model(tmp_path / "model")
    import_weights(tmp_path / "model", tmp_path / "run")
    export_weights(RunDirectory(tmp_path / "run"), tmp_path / "again", dtype="F32")
    found = read_model(tmp_path / "again")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "float32"


def run_steps(recipe_file: Path, overrides: list[str]) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True))


def run_and_evaluate(recipe_file: Path, overrides: list[str]) -> None:
    run_steps(recipe_file, overrides)
    evaluate(load_recipe(recipe_file, overrides), Console(quiet=True))


def check_losses(recipe: Recipe, model: Any) -> None:
    """Check that a model of transformers has the losses of `longring evaluate`, by bucket."""
    manifest = open_prepared(recipe.data.directory)
    found = json.loads((Path(recipe.run_directory) / "evaluation.json").read_text())["buckets"]
    for bucket, entry in zip(manifest.buckets("held_out"), found, strict=True):
        rows = torch.from_numpy(manifest.reader(bucket).read(np.arange(bucket.sequences))).long()
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits
        exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), rows[:, 1:].flatten())
        assert entry["loss"] == pytest.approx(exact.item(), rel=1e-5)


def evaluate_as(path: Path, data: str, *overrides: str) -> dict[str, Any] | None:
    return evaluate_weights(path, data, overrides, path.parent / "logs", Console(quiet=True))


def check_evaluations(on_ranks: Any, recipe_file: Path, recipe: Recipe, targets: list[Path]) -> None:
    """Check that weights have the losses of their run on its data, on any ranks, and that settings change them."""
    expected = json.loads((Path(recipe.run_directory) / "evaluation.json").read_text())
    data = recipe.data.directory
    divisions = [(1, data, []), (2, data, []), (2, str(recipe_file), ["parallel.tensor=2", "parallel.zero_stage=3"])]
    for path, (ranks, source, settings) in zip(targets, divisions, strict=True):
        found, *others = on_ranks(ranks, evaluate_as, path, source, *settings)
        assert others == [None] * (ranks - 1)
        assert found["target"] == path.name
        assert found["buckets"][-1]["cp"] == (ranks if source == data else 1)
        for ours, theirs in zip(found["buckets"], expected["buckets"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
            assert ours["unigram_loss"] == pytest.approx(theirs["unigram_loss"], rel=1e-9)
    [other] = on_ranks(1, evaluate_as, targets[0], data, "model.rope_base=1e3", "evaluate.max_tokens_per_bucket=512")
    assert other["tokens"] < expected["tokens"]
    assert other["loss"] != pytest.approx(expected["loss"], rel=1e-6)


MODEL = ["model.qk_norm=head", "model.tied_head=true", "model.vocab_size=600"]


@pytest.mark.full
def test_a_run_is_exported_imported_and_trained_on(on_ranks, recipe_file, tmp_path):
    """transformers loads the exported model, and a run that begins from it, imported again, has its weights."""
    transformers = pytest.importorskip("transformers")
    first = [*MODEL, "train.steps=5", "parallel.tensor=2", "parallel.zero_stage=3"]
    first += [f"run_directory={tmp_path}/first"]
    on_ranks(2, run_and_evaluate, recipe_file, first)
    export, again = tmp_path / "model", tmp_path / "imported"
    assert cli.main(["export", f"{tmp_path}/first", str(export), "--dtype", "F32"]) == 0
    saved = read_whole(tmp_path / "first" / "checkpoints" / "step-00000005")
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert len(tokenizer) == 500
    assert model.config.vocab_size == 600
    embedding = model.get_input_embeddings().weight.detach()
    assert torch.equal(embedding, torch.from_numpy(saved["embedding.weight/weight"])[:600])
    check_losses(load_recipe(recipe_file, first), model)
    # What published models have beside their weights, and a run knows nothing of.
    (export / "chat_template.jinja").write_text("{{ messages }}")
    (export / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "eos_token_id": [3, 4], "max_position_embeddings": 8192}))
    assert cli.main(["import", str(export), str(again)]) == 0
    check_evaluations(on_ranks, recipe_file, load_recipe(recipe_file, first), [export, again, tmp_path / "first"])
    # Steps of a rate that rounds away leave the weights as they are, whether they come by an import or as they are.
    second = [*MODEL, "train.steps=2", "train.warmup_steps=1", "train.learning_rate=1e-30", "train.min_learning_rate=0"]
    divided = ["parallel.tensor=2", "parallel.zero_stage=3", "parallel.sequence_parallel=true", "model.rope_base=2e5"]
    # The published length holds as long as RoPE is what it was.
    for ranks, origin, mesh, longest in ((1, again, [], 8192), (2, export, divided, 512)):
        name, longer = f"from-{origin.name}", tmp_path / f"longer-{origin.name}"
        settings = [*second, *mesh, f"init.from={origin}", f"run_directory={tmp_path}/{name}"]
        on_ranks(ranks, run_steps, recipe_file, settings)
        kept = read_whole(tmp_path / name / "checkpoints" / "step-00000002")
        for weight in (weight for weight in saved if weight.endswith("/weight")):
            rows = 600 if "embedding" in weight else None  # the rest is padding, zeros in an imported model
            assert (kept[weight][:rows] == saved[weight][:rows]).all(), weight
        # The next export still has them.
        assert cli.main(["export", f"{tmp_path}/{name}", str(longer), "--dtype", "F32"]) == 0
        for file in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (longer / file).read_bytes() == (export / file).read_bytes(), file
        written = json.loads((longer / "config.json").read_text())
        assert (written["eos_token_id"], written["max_position_embeddings"]) == ([3, 4], longest)
        assert transformers.AutoModelForCausalLM.from_pretrained(longer).config.vocab_size == 600


def damaged(file: str, content: bytes) -> Callable[[Path], None]:
    """Return a mistake: a file of the model has other content."""

    def mistake(model: Path) -> None:
        (model / file).write_bytes(content)

    return mistake


def without(file: str) -> Callable[[Path], None]:
    return lambda model: (model / file).unlink()


def indexed(content: bytes) -> Callable[[Path], None]:
    """Return a mistake: the model has an index of this content instead of a single file."""

    def mistake(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / INDEX).write_bytes(content)

    return mistake


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def mistake(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return mistake


def head_in_two_files(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    norm, head = "model.norm.weight", "lm_head.weight"
    save_file({norm: tensors.pop(norm), head: tensors[head] + 1}, model / "b.safetensors")
    save_file(tensors, model / "a.safetensors")
    (model / INDEX).write_text(
        json.dumps({"weight_map": {**dict.fromkeys(tensors, "a.safetensors"), norm: "b.safetensors"}})
    )


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (without("config.json"), "bytes; name the directory of a Hugging Face model"),
    "config of text": (damaged("config.json", b"a"), "config.json: not JSON: .*; download it again"),
    "config of a list": (damaged("config.json", b"[]"), "config.json: holds no table; download it again"),
    "no weights": (without("model.safetensors"), "missing; name a directory with safetensors files"),
    "weights of text": (damaged("model.safetensors", b"text" * 9), "not readable: .*; download it again"),
    "an index that leads out": (
        indexed(b'{"weight_map": {"a": "../b.safetensors"}}'),
        "no readable index of files; download it again",
    ),
    "an index without tensors": (
        indexed(b'{"weight_map": {}}'),
        "has no tensor model.embed_tokens.weight; name a directory with all files of the model",
    ),
    "a tensor in two files": (
        head_in_two_files,
        "b.safetensors: has a tensor lm_head.weight, which model.safetensors.index.json does not place there; "
        "download both again",
    ),
    "another shape": (
        with_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)})),
        r"model.norm.weight is F32 of shape \[31\], and config.json says \[32\] .*; bring the two together",
    ),
    "integers": (
        with_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)})),
        "model.norm.weight is I32 .* of F32 or BF16 or F16; bring the two together",
    ),
    "values that are not finite": (
        with_tensors(lambda tensors: tensors["model.norm.weight"].fill_(math.nan)),
        "model.safetensors: model.norm.weight has values that are not finite; download it again",
    ),
    "another tensor": (
        with_tensors(lambda tensors: tensors.update({"model.layers.0.self_attn.sinks": torch.ones(4)})),
        "has a tensor model.layers.0.self_attn.sinks, which config.json does not explain; import another model",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_directory_that_is_not_whole_is_refused_and_nothing_is_left(tmp_path, capsys, name):
    mistake, message = MISTAKES[name]
    make_model(tmp_path / "model")
    make_model(tmp_path / "other")
    mistake(tmp_path / "model")
    assert cli.main(["import", f"{tmp_path}/model", f"{tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model", "other"}
    assert cli.main(["import", f"{tmp_path}/other", f"{tmp_path}/run"]) == 0


def test_a_head_beside_a_tied_embedding_must_equal_it(tmp_path):
    tensors = make_model(tmp_path / "model", "qwen2")
    file, embedding = tmp_path / "model" / "model.safetensors", tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding + 1}, file)
    with pytest.raises(ValueError, match="lm_head.weight differs from .* tie_word_embeddings .*; set it to false"):
        import_weights(tmp_path / "model", tmp_path / "run")
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file)
    assert import_weights(tmp_path / "model", tmp_path / "run").tied_head
    save_file({**tensors, "lm_head.weight": embedding + 1}, file)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    assert not import_weights(tmp_path / "model", tmp_path / "untied").tied_head


def test_a_model_without_tokenizer_json_is_exported_in_another_dtype(tmp_path):
    make_model(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "model" / "tokenizer.model")
    import_weights(tmp_path / "model", tmp_path / "run")
    export_weights(RunDirectory(tmp_path / "run"), tmp_path / "again", dtype="F16")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        path.name for path in (tmp_path / "model").iterdir()
    }


def test_values_beyond_those_of_a_dtype_are_refused(tmp_path):
    make_model(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] = 70_000
    save_file(tensors, file, metadata={"format": "pt"})
    import_weights(tmp_path / "model", tmp_path / "run")
    run, out = RunDirectory(tmp_path / "run"), tmp_path / "out"
    with pytest.raises(ValueError, match="lm_head.weight has values beyond its largest; export with --dtype BF16 or"):
        export_weights(run, out, dtype="F16")
    assert not list(tmp_path.glob("out*"))
    export_weights(run, out, dtype="BF16")
    assert load_file(out / "model.safetensors")["lm_head.weight"][0, 0] == 70_144


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_file_that_cannot_be_written_is_named_with_a_way_out(tmp_path, command):
    make_model(tmp_path / "model")
    import_weights(tmp_path / "model", tmp_path / "run")
    out, source = tmp_path / "out", {"import": "model", "export": "run"}[command]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=f"^{out}: File too large; raise the limit on the size of files ") as error:
            write(command, tmp_path / source, out)
        assert str(error.value).endswith("(`ulimit -f unlimited`), and give the same command again")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("out*"))
    write(command, tmp_path / source, out)


def write(command: str, source: Path, out: Path) -> None:
    import_weights(source, out) if command == "import" else export_weights(RunDirectory(source), out)


@pytest.mark.parametrize("name", [".", "link", "a/../run"])
def test_a_new_directory_has_any_name(tmp_path, monkeypatch, name):
    make_model(tmp_path / "model")
    (tmp_path / "here" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    if name == ".":
        (tmp_path / "here" / "a").rmdir()
    if name == "link":
        Path(name).symlink_to("target")
    import_weights(tmp_path / "model", Path(name))
    assert (tmp_path / "here" / name / "tokenizer.json").is_file()


def test_what_export_needs(tmp_path):
    make_model(tmp_path / "model")
    import_weights(tmp_path / "model", tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ValueError, match="has content; name a new directory"):
        export_weights(run, tmp_path / "model")
    with pytest.raises(ValueError, match="--family gpt: must be one of llama, "):
        export_weights(run, tmp_path / "new", family="gpt")
    with pytest.raises(
        ValueError, match="none: neither a run nor an import; name a directory that `longring train` or"
    ):
        export_weights(RunDirectory(tmp_path / "none"), tmp_path / "new")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="no checkpoint yet; train first, with `longring train`"):
        export_weights(RunDirectory(tmp_path / "empty"), tmp_path / "new")
    config = tmp_path / "run" / "published" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"vocab_size": 300', '"vocab_size": 500'))
    with pytest.raises(
        ValueError, match=r"384 rows, and 500 tokens are said; bring back config.json or tokenizer.json"
    ):
        export_weights(run, tmp_path / "new")
    config.write_text(text)
    [damaged_file, *_] = sorted((tmp_path / "run" / "checkpoints" / "step-00000000").glob("*.safetensors"))
    content = damaged_file.read_bytes()
    damaged_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="; bring back a copy of it, or remove .* to export the checkpoint before"):
        export_weights(run, tmp_path / "new")
    damaged_file.write_bytes(content)
    export_weights(run, tmp_path / "new", family="mistral")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "mistral"


def test_another_family_keeps_the_data_type_that_transformers_casts_to(tmp_path):
    write_model(tmp_path / "model", replace(published("llama"), other={"torch_dtype": "float32"}), 1)
    import_weights(tmp_path / "model", tmp_path / "run")
    export_weights(RunDirectory(tmp_path / "run"), tmp_path / "out", family="mistral")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["torch_dtype"], written.get("dtype")) == ("float32", None)


@pytest.mark.full
def test_what_a_run_needs_to_be_exported_and_to_begin_from_imported_weights(on_ranks, recipe_file, tmp_path):
    on_ranks(1, run_steps, recipe_file, ["train.steps=5", f"run_directory={tmp_path}/run"])
    run = RunDirectory(tmp_path / "run")
    tokenizer = run.tokenizer_file.read_bytes()
    run.tokenizer_file.unlink()
    with pytest.raises(ValueError, match="copy tokenizer.json of the data that the run was trained on to there"):
        export_weights(run, tmp_path / "model")
    run.tokenizer_file.write_bytes(tokenizer)
    assert export_weights(run, tmp_path / "model").family == "llama"
    assert {tensor.dtype for tensor in read_model(tmp_path / "model").values()} == {torch.float32}
    recipe = json.loads(run.recipe_file.read_text())
    run.recipe_file.write_text(json.dumps({**recipe, "train": {**recipe["train"], "dtype": "bfloat16"}}))
    export_weights(run, tmp_path / "narrow")
    assert {tensor.dtype for tensor in read_model(tmp_path / "narrow").values()} == {torch.bfloat16}
    import_weights(tmp_path / "model", tmp_path / "imported")
    begin = [f"init.from={tmp_path}/imported", "model.vocab_size=500", f"run_directory={tmp_path}/second"]
    with pytest.raises(ValueError, match="imported weights have no moments; set it to false"):
        preflight(load_recipe(recipe_file, [*begin, "init.moments=true"]), 1)
    preflight(load_recipe(recipe_file, [*begin, "init.moments=false"]), 1)
