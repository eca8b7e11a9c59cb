"""The meeting of the launchers of several nodes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import timedelta

FIRST_NODE = timedelta(minutes=10)
"""Longest wait for the first node, which may take minutes to import torch from a cold network file system."""


@dataclass(frozen=True)
class Rendezvous:
    """The rendezvous of the launchers of several nodes."""

    endpoint: str
    """host:port on the first node."""
    job: str
    """Name of this start, the same on all nodes."""
    num_nodes: int
    """Number of nodes."""
    node: int
    """Index of this node, from 0."""
    address: str
    """Name or address at which other nodes reach this one."""

    def __post_init__(self) -> None:
        host, _, port = self.endpoint.rpartition(":")
        if not (host and re.fullmatch("[0-9]{1,5}", port, re.ASCII) and 0 < int(port) < 65536):
            raise ValueError(
                f"--rendezvous {self.endpoint}: must be HOST:PORT with a port from 1 to 65535; give it as in "
                "slurm/train.sbatch"
            )

    @property
    def torchrun_options(self) -> list[str]:
        """Command-line options for torchrun.

        is_host: torchrun would guess it from host names, which fails if a node has several. local-addr: torchrun would
        give other nodes the full name of this one, which /etc/hosts may map to localhost.
        """
        conf = f"is_host={int(self.node == 0)},read_timeout={FIRST_NODE.seconds}"
        return [
            *("--nnodes", str(self.num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint),
            *("--rdzv-id", self.job, "--rdzv-conf", conf, "--local-addr", self.address),
        ]


@dataclass(frozen=True, kw_only=True)
class ManyNodes:
    """The options by which the launchers of several nodes meet, as `longring train` and `evaluate` take them."""

    nodes: int = 1
    """Number of nodes."""
    node: int = 0
    """Index of this node, from 0."""
    endpoint: str | None = None
    """host:port on the first node."""
    job: str | None = None
    """Name of this start, the same on all nodes."""
    address: str | None = None
    """Name or address at which other nodes reach this one."""

    def rendezvous(self, number: int = 0) -> Rendezvous | None:
        """Return the meeting with this number, each on a port of its own; None: this node is alone.

        Raises ValueError if an option is missing.
        """
        if self.nodes == 1 and not self.endpoint:
            return None
        if not (self.endpoint and self.job and self.address):
            raise ValueError(
                f"--nodes {self.nodes}: several nodes need --rendezvous, --job and --address too; give them as in "
                "slurm/train.sbatch"
            )
        first = Rendezvous(self.endpoint, self.job, self.nodes, self.node, self.address)
        host, _, port = self.endpoint.rpartition(":")
        return replace(first, endpoint=f"{host}:{int(port) + number}")
