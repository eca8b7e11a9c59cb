"""The settings that decide the content of prepared and ordered data, as a manifest records and compares them."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..config import DataConfig, SourceConfig
from ..order_config import OrderConfig


def settings_of(config: DataConfig | OrderConfig) -> dict[str, Any]:
    """Return the settings that decide the content of prepared or ordered data, as JSON holds them.

    These are all settings but the directories.
    """
    kept = {key: value for key, value in asdict(config).items() if key not in ("directory", "work_directory")}
    return json.loads(json.dumps(kept))  # tuples become lists


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings_of` prepared data with the default of every setting that an earlier version did not have.

    Raises ValueError if the settings of the sources are not tables.
    """
    defaults, source = settings_of(DataConfig(directory="-")), json.loads(json.dumps(asdict(SourceConfig())))
    lone, several = settings["source"], settings["sources"]
    if not isinstance(several, dict) or not all(isinstance(one, dict) for one in (lone, *several.values())):
        raise ValueError("its sources are not tables")
    named = {name: {**source, **one} for name, one in several.items()}
    return {**defaults, **settings, "source": {**source, **lone}, "sources": named}


def differences(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value before, value now) of each setting that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now | before:
            yield from differences(f"{path}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield path, before, now
