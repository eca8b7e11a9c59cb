from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from longring.data.config import DataConfig, SourceConfig


@pytest.fixture
def config(make_config: Callable[..., DataConfig], words: Callable[..., str], tmp_path: Path) -> DataConfig:
    """Return the settings of data with twelve input shards."""
    base = make_config([])
    Path(base.source.path).unlink()
    (tmp_path / "corpus").mkdir()
    for part in range(12):
        lines = [json.dumps({"text": words(40 + 11 * number, 50 * part + number)}) + "\n" for number in range(30)]
        (tmp_path / "corpus" / f"{part:02d}.jsonl").write_text("".join(lines))
    source = SourceConfig(kind="json", path=str(tmp_path / "corpus"))
    return replace(base, source=source, input_shard_bytes=1, rest="pack", shard_tokens=4_096)
