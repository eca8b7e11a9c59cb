"""A script that runs on every host of a lab network and answers jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from .lab_network import Network


class LabHosts:
    """`script --serve` on every host of a network, with arguments.

    The script joins the others and prints a line. Then it reads jobs, a line of JSON each, and answers each with a line
    of JSON.
    """

    def __init__(self, network: Network, script: str, *arguments: str) -> None:
        self.network = network
        command = [sys.executable, "-P", script, "--serve", *arguments]
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # torch warns that hosts have no names
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.processes = [network.popen(host, command, quiet, **pipes) for host in range(network.num_hosts)]
        self._lines()

    def answers(self, job: Mapping[str, Any]) -> list[Any]:
        """Send a job to all hosts and return the answer of every host."""
        for process in self.processes:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        return [json.loads(line) for line in self._lines()]

    def _lines(self) -> list[str]:
        lines = [process.stdout.readline() for process in self.processes]
        if "" in lines:
            raise RuntimeError(f"host {lines.index('')} ended: see its error above")
        return lines
