"""Damaged ordered data: each error names `longring order`, and doing what it says gives the data as it was."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.files import tree
from helpers.lanes import by_lane
from longring.data.config import DataConfig
from longring.data.format.manifest import open_prepared
from longring.data.order.stages import order
from longring.data.order_config import OrderConfig
from longring.data.prepare.prepare import prepare
from rich.console import Console

QUIET = Console(quiet=True)


@pytest.fixture
def data(make_config: Callable[..., DataConfig], words: Callable[..., str]) -> DataConfig:
    """Prepared data of sixty documents, with nothing dropped."""
    config = make_config([words(60 + 3 * number, number) for number in range(60)], rest="pack")
    prepare(config, QUIET, workers=1)
    return config


@pytest.fixture
def config(tmp_path: Path) -> OrderConfig:
    return OrderConfig(
        mode="in_context", directory=str(tmp_path / "ordered"), embedding_dimensions=8, neighbors=5, window_tokens=64
    )


@pytest.fixture
def whole(data: DataConfig, config: OrderConfig) -> dict[str, bytes]:
    """The files of the ordered data before it is damaged; it has several parts."""
    order(data, config, QUIET, workers=1)
    assert sum(open_prepared(config.directory).sources.values()) > 2
    return tree(config.directory)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-512])])
def test_the_same_command_makes_missing_and_truncated_shards_again(
    data: DataConfig, config: OrderConfig, whole: dict[str, bytes], damage: Callable
):
    shards = sorted(Path(config.directory).glob("shards/*/train*.tar"))
    for file in (shards[0], shards[-1]):
        damage(file)
    with pytest.raises(ValueError, match="run `longring order RECIPE`, which makes it again"):
        open_prepared(config.directory)
    with pytest.raises(ValueError, match="run `longring order RECIPE`, which makes it again"):
        order(data, config, QUIET, only="embed")
    order(data, config, QUIET, workers=1)
    open_prepared(config.directory)
    assert tree(config.directory) == whole
    assert not Path(f"{config.directory}.partial").exists()


def test_a_shard_with_a_wrong_bit_is_made_again(data: DataConfig, config: OrderConfig, whole: dict[str, bytes]):
    shard = min(Path(config.directory).glob("shards/*/train*.tar"))
    content = bytearray(shard.read_bytes())
    content[3_000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{shard}: SHA-256 is .*; run `longring order RECIPE --verify`"):
        list(open_prepared(config.directory).verify())
    shutil.rmtree(f"{data.directory}.order")
    order(data, config, QUIET, workers=1, verify=True)
    list(open_prepared(config.directory).verify())
    assert tree(config.directory) == whole, "also without the files of the stages"


@pytest.mark.parametrize(
    "name", by_lane(["manifest.json", "shards.npy", "placement.npy", "order.json"], quick=["placement.npy"])
)
def test_a_damaged_manifest_or_file_beside_the_manifest_says_what_to_delete(
    data: DataConfig, config: OrderConfig, whole: dict[str, bytes], name: str
):
    file = Path(config.directory, name)
    file.write_bytes(file.read_bytes()[:-8])
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{file}: (SHA-256|damaged)") as error:
            order(data, config, QUIET, workers=1)
        assert f"delete {config.directory} and run `longring order RECIPE`" in str(error.value)
        assert "longring prepare" not in str(error.value)
    shutil.rmtree(config.directory)
    order(data, config, QUIET, workers=1)
    assert {key: value for key, value in tree(config.directory).items() if key.endswith(".tar")} == {
        key: value for key, value in whole.items() if key.endswith(".tar")
    }
    open_prepared(config.directory)


@pytest.mark.full
def test_other_settings_have_three_ways_out(data: DataConfig, config: OrderConfig, whole: dict[str, bytes]):
    other = replace(config, neighbors=4)
    with pytest.raises(ValueError, match=r"order\.neighbors = 4: order\.directory = .* was made with 5") as error:
        order(data, other, QUIET, workers=1)
    assert f"delete {config.directory} and run `longring order RECIPE`" in str(error.value)
    order(data, replace(other, neighbors=5), QUIET, workers=1)
    order(data, replace(other, directory=f"{config.directory}2"), QUIET, workers=1)
    shutil.rmtree(config.directory)
    order(data, other, QUIET, workers=1)
    open_prepared(config.directory).check_made_from(data, other)
