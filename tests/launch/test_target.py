"""`longring evaluate` takes weights of any kind on named data; what does not fit is refused before ranks join."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.published import write_model
from longring.data.order_config import OrderConfig
from longring.launch import cli
from longring.launch.commands import evaluate as command
from longring.launch.config import Recipe, load_recipe
from longring.launch.run_directory import RunDirectory
from longring.launch.target import target_of_weights
from longring.launch.weights.on_data import recipe_of_weights
from longring.launch.weights.origin import weights_at
from longring.model.families.read import PublishedModel
from longring.parallel.world import World
from torch._C._distributed_c10d import HashStore
from torch.distributed.run import parse_args

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, address="localhost", port=1, hosted=False)


@pytest.fixture
def model(recipe_file, tmp_path) -> Path:
    """A Hugging Face model of the tokens of the prepared data."""
    recipe = load_recipe(recipe_file)
    published = PublishedModel(family="llama", config=recipe.model, vocab_size=500, max_tokens=512)
    write_model(tmp_path / "model", published)
    shutil.copy(Path(recipe.data.directory) / "tokenizer.json", tmp_path / "model")
    return tmp_path / "model"


def target(path: Path, data: str, *overrides: str) -> Recipe:
    return target_of_weights(path, data, overrides, RunDirectory(path / "logs"), HashStore(), ALONE).recipe


@pytest.mark.full
def test_weights_without_the_tokens_of_the_data_are_refused(recipe_file, model):
    data, file = load_recipe(recipe_file).data.directory, model / "tokenizer.json"
    content = file.read_text()
    # What a run keeps, such as measured grids, is kept with the logs and nowhere else.
    assert target(model, data).run_directory == str(model / "logs")
    file.unlink()
    with pytest.raises(
        ValueError, match=f"^{model}: has no {file}; copy tokenizer.json of the data that it was trained"
    ):
        target(model, data)
    tree = json.loads(content)
    vocabulary = tree["model"]["vocab"]
    first, second = [token for token in vocabulary if len(token) == 1][5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tree))
    advice = f"prepare the data with data.tokenizer.path = {file}"
    with pytest.raises(ValueError, match=f"^{model}: has token .* with id .*, and the tokenizer of .*; {advice}"):
        target(model, data)
    file.write_text(content)
    config = load_recipe(recipe_file).model
    small = PublishedModel(family="llama", config=config, vocab_size=300, max_tokens=512)
    write_model(model.parent / "small", small)
    with pytest.raises(ValueError, match="small: has 384 rows of embedding, and the 500 tokens of .* need 512; "):
        target(model.parent / "small", data)


@pytest.mark.full
def test_the_recipe_of_an_evaluation(recipe_file, model):
    data, weights = load_recipe(recipe_file).data.directory, weights_at(model)
    for ranks, tokens, cp in ((1, 512, 1), (2, 256, 2), (6, 256, 2), (3, 512, 1)):
        recipe = recipe_of_weights(weights, data, [], ranks)
        assert (recipe.parallel.tokens_per_rank, recipe.max_context_parallel) == (tokens, cp)
        assert recipe.accumulation_steps(ranks) * recipe.parallel.tokens_per_rank == 512
        assert recipe.model == weights.config
    with pytest.raises(
        ValueError, match=r"'train.steps=2': with --data it has no effect, .*; leave it out, or set one"
    ) as e:
        recipe_of_weights(weights, data, ["train.steps=2"], 1)
    assert "model.rope*" in str(e.value)
    recipe = recipe_of_weights(weights, str(recipe_file), ["model.rope_base=7e5"], 1)
    assert recipe.model.rope_base == 7e5
    assert recipe.order == OrderConfig()


@pytest.mark.full
def test_the_command_starts_ranks_on_other_data(recipe_file, model, monkeypatch, capsys):
    started, data = [], load_recipe(recipe_file).data.directory
    assert cli.main(["evaluate", str(model)]) == 2
    assert "; name the directory of a run, or with --data the data that other weights" in capsys.readouterr().err

    def start(module: str, arguments: list[str], count: int, nodes: None, *, gpu_queues: int) -> int:
        parse_args(["--nproc-per-node", "1", "--module", module, *arguments])  # torchrun looks for its own in them
        logs = Path(arguments[arguments.index("--reports") + 1])
        assert logs.is_dir()
        started.append((arguments[: arguments.index("--json")], count, logs))
        (logs / "rank-00000.log").touch()
        Path(arguments[arguments.index("--json") + 1]).write_text('{"target": "small"}')
        return len(started) - 1

    monkeypatch.setattr(command, "start_ranks", start)
    below = model / "config.json" / "x"
    for name, why in (
        (model, "is a directory; name a file in it"),
        (below, "is not a directory; name a file in a directory"),
    ):
        assert cli.main(["evaluate", str(model), "--data", data, "--json", str(name)]) == 2
        assert why in capsys.readouterr().err
    assert not started
    found = model.parent / "x.json"
    assert cli.main(["evaluate", str(model), "--data", data, "--ranks", "3", "--json", str(found)]) == 0
    assert json.loads(found.read_text()) == {"target": "small"}
    assert cli.main(["evaluate", str(model), "--data", str(recipe_file), "evaluate.max_tokens_per_bucket=64"]) == 1
    assert [(arguments, count) for arguments, count, _ in started] == [
        ([str(model), "--data", data], 3),
        ([str(model), "evaluate.max_tokens_per_bucket=64", "--data", str(recipe_file)], 1),
    ]
    assert [logs.exists() for *_, logs in started] == [False, True]
    assert f"the logs of the ranks are in {started[1][2]}" in capsys.readouterr().err
    shutil.rmtree(started[1][2])
