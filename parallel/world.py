"""The world of a start as one rank sees it: read from the environment once, and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_ADVICE = "start with torchrun, or use the `longring` command"


@dataclass(frozen=True)
class World:
    """The number of ranks, the numbers of this one, and the address at which the ranks of a start meet."""

    rank: int
    size: int
    local_rank: int
    """Index of this rank within its node; its GPU has the same index."""
    local_size: int
    """Number of ranks on this node."""
    address: str
    """Name or address of the machine at which ranks meet."""
    port: int
    hosted: bool
    """Whether torchrun listens at the address; else rank 0 does."""

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> World:
        """Return the world that torchrun's variables describe. Raises ValueError for one that is missing or impossible.

        Without LOCAL_WORLD_SIZE all ranks are on one node.
        """
        size = _number(variables, "WORLD_SIZE", 1)
        rank = _number(variables, "RANK", 0, size - 1, "WORLD_SIZE - 1")
        local_size = size
        if "LOCAL_WORLD_SIZE" in variables:
            local_size = _number(variables, "LOCAL_WORLD_SIZE", 1, size, "WORLD_SIZE")
        local_rank = _number(variables, "LOCAL_RANK", 0, local_size - 1, "the number of ranks on the node - 1")
        address = _set(variables, "MASTER_ADDR")[:300]
        if not re.fullmatch(r"[\w.:%-]+", address, re.ASCII):
            raise ValueError(f"MASTER_ADDR = {address!r}: is no name or address of a machine; {_ADVICE}")
        return cls(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            address=address,
            port=_number(variables, "MASTER_PORT", 1, 65535),
            hosted=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


def _set(variables: Mapping[str, str], name: str) -> str:
    if name not in variables:
        raise ValueError(f"{name}: not set in the environment; {_ADVICE}")
    return variables[name]


def _number(variables: Mapping[str, str], name: str, least: int, most: int | None = None, meaning: str = "") -> int:
    """Return a variable from `least` to `most`, which `meaning` explains. Raises ValueError for any other value."""
    text = _set(variables, name)[:20]  # cut, since an error shows it
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
    if number < least or (most is not None and number > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} = {text!r}: must be a whole number {limit}{meaning and f' = {meaning}'}; {_ADVICE}")
    return number
