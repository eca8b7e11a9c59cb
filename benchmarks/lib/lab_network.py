"""Hosts on one machine, joined by shaped, full-duplex links: where links, not cores, are scarce.

    with Network("ring", num_hosts=4, mbit_per_s=200) as network:
        ranks = [network.popen(host, [sys.executable, "rank.py"]) for host in range(4)]
        before = network.sent_bytes()
        ...
        sent = network.sent_bytes() - before            # bytes by (from, to)

A host is a network namespace; rank.py calls torch.distributed.init_process_group("gloo"). Fabrics: mesh, a link for
every pair; ring, links to the two neighbours, which forward other traffic the shorter way; switch, one port a host,
limited in each direction. Needs root and iproute2. What gloo gets out of it, and the rate up to which a machine keeps
all links full, says `python benchmarks/gloo_links.py`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, get_args

Fabric = Literal["mesh", "ring", "switch"]

SWITCH = "switch"
PAYLOAD_SHARE = 1448 / 1514
"""Of a full Ethernet frame: what TCP with timestamps carries in it."""
NAMESPACES = Path("/run/netns")
CAPABILITIES = 1 << 12 | 1 << 21
"""CAP_NET_ADMIN and CAP_SYS_ADMIN, by their numbers in linux/capability.h."""
SETTINGS = {
    "ip_forward": "1",
    "conf/all/rp_filter": "0",
    "tcp_slow_start_after_idle": "0",  # hosts compute between messages
    "tcp_congestion_control": "reno",  # nothing is lost here, so it keeps links full; bbr probes and falls behind
}
BURST = "64kb"
"""What an idle link may send at once. Less, and a timer that is late on a busy machine costs rate."""
ACKNOWLEDGEMENT = "match u16 0x0000 0xff80 at 2 match u8 0x10 0xff at 33"
"""IP packets below 128 bytes with the TCP flag ACK alone. No data: a stream's data must stay in order."""


def unavailable() -> str | None:
    """Why this machine cannot hold such a network and what would help, or None."""
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} not found: install iproute2"
    [granted] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")]
    if int(granted.split()[1], 16) & CAPABILITIES != CAPABILITIES:
        return "network namespaces need root: use sudo, or a container with --cap-add NET_ADMIN --cap-add SYS_ADMIN"
    return None


def address(host: int) -> str:
    """Of all ports of a host."""
    return f"10.77.0.{host + 1}"


def from_hosts(sent: Mapping[tuple[str, str], int]) -> int:
    """Of what `sent_bytes` counts, the bytes that left hosts: a switch counts the same bytes again."""
    return sum(count for (source, _), count in sent.items() if source != SWITCH)


class Network:
    """Namespaces, links and processes: built on entering, gone on leaving.

    A process that is killed leaves its namespaces, `longring-PID-...` of `ip netns list`; `ip netns del` removes them.
    """

    def __init__(self, fabric: Fabric, num_hosts: int, mbit_per_s: float) -> None:
        """Hosts 0 to num_hosts - 1. The rate is that of each link and direction, headers included."""
        if fabric not in get_args(Fabric) or not 2 <= num_hosts <= 250 or mbit_per_s <= 0:
            raise ValueError(
                f"fabric {fabric!r}, num_hosts {num_hosts}, mbit_per_s {mbit_per_s}: "
                f"take one of {', '.join(get_args(Fabric))}, 2 to 250 hosts, and a rate above 0"
            )
        self.fabric, self.num_hosts, self.mbit_per_s = fabric, num_hosts, mbit_per_s
        self.prefix = f"longring-{os.getpid()}-{secrets.token_hex(3)}-"
        hosts = range(num_hosts)
        if fabric == "switch":
            self.links = [(str(host), SWITCH) for host in hosts]
        else:
            pairs = {
                (i, j) for i in hosts for j in hosts if i < j and (fabric == "mesh" or j - i in (1, num_hosts - 1))
            }
            self.links = [(str(i), str(j)) for i, j in sorted(pairs)]
        self.ports: dict[str, list[str]] = {}
        """By host or switch: what its links lead to. The device is called `to-` and that."""
        for a, b in self.links:
            self.ports.setdefault(a, []).append(b)
            self.ports.setdefault(b, []).append(a)
        self.processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Network:
        if reason := unavailable():
            raise RuntimeError(reason)
        with ExitStack() as undo:
            for node in self.ports:
                undo.callback(self._remove, node)
                _run("ip", "netns", "add", self.prefix + node)
            undo.callback(self._end_processes)
            self._build()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def popen(self, host: int, command: list[str], env: Mapping[str, str] | None = None, **options: Any) -> Any:
        """The subprocess.Popen of a command on a host, as rank `host` of torch.distributed.

        `env` is added to this process's environment; options are Popen's. The process ends with the network.
        """
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": f"to-{self.ports[str(host)][0]}",  # any: all ports have the host's address
            "MASTER_ADDR": address(0),
            "MASTER_PORT": "29555",  # no other network sees it
            "RANK": str(host),
            "WORLD_SIZE": str(self.num_hosts),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(host),
            "GROUP_WORLD_SIZE": str(self.num_hosts),
            **(env or {}),
        }
        inside = ["ip", "netns", "exec", f"{self.prefix}{host}", *command]
        self.processes.append(subprocess.Popen(inside, env=environment, **options))
        return self.processes[-1]

    def sent_bytes(self) -> Counter[tuple[str, str]]:
        """Bytes that every link carried so far, by (from, to), where "0" is host 0 and "switch" the switch.

        The kernel's count of what its shaper let pass: headers of every packet and acknowledgements are in it, and what
        a ring forwards is counted on each link that it passes. Differences: `network.sent_bytes() - before`.
        """
        sent: Counter[tuple[str, str]] = Counter()
        for node in self.ports:
            for qdisc in json.loads(_run("tc", "-n", self.prefix + node, "-json", "-s", "qdisc", "show")):
                if qdisc["kind"] == "htb":
                    sent[node, qdisc["dev"].removeprefix("to-")] = qdisc["bytes"]
        return sent

    def set_rate(self, mbit_per_s: float) -> None:
        """Of all links from now on."""
        self.mbit_per_s = mbit_per_s
        for node, ports in self.ports.items():
            _batch("tc", self.prefix + node, [line for port in ports for line in self._classes("change", port)])

    def next_hop(self, host: int, target: int) -> str:
        """What the link leads to on which `host` sends to `target`."""
        if self.fabric == "ring":
            onwards = (target - host) % self.num_hosts <= self.num_hosts // 2
            return str((host + (1 if onwards else -1)) % self.num_hosts)
        return str(target) if self.fabric == "mesh" else SWITCH

    def num_hops(self, source: int, target: int) -> int:
        """Links between two hosts; a switch's two count as one."""
        ahead = (target - source) % self.num_hosts
        return min(ahead, self.num_hosts - ahead) if self.fabric == "ring" else 1

    def _build(self) -> None:
        for a, b in self.links:
            _run("ip", "-n", self.prefix + a, "link", "add", f"to-{b}", "type", "veth",
                 "peer", "name", f"to-{a}", "netns", self.prefix + b)  # fmt: skip
        for node, ports in self.ports.items():
            lines = ["link set lo up", *(f"link set to-{port} up" for port in ports)]
            if node == SWITCH:
                lines += ["link add bridge type bridge", "link set bridge up"]
                lines += [f"link set to-{port} master bridge" for port in ports]
            else:
                lines += [f"addr add {address(int(node))}/32 dev to-{port}" for port in ports]
                lines += [self._route(int(node), target) for target in range(self.num_hosts) if target != int(node)]
            _batch("ip", self.prefix + node, lines)
            _batch("tc", self.prefix + node, [line for port in ports for line in self._shaper(port)])
            settings = "; ".join(f"echo {value} > /proc/sys/net/ipv4/{name}" for name, value in SETTINGS.items())
            _run("ip", "netns", "exec", self.prefix + node, "sh", "-ec", settings)

    def _route(self, host: int, target: int) -> str:
        port = self.next_hop(host, target)
        via = "" if port in (SWITCH, str(target)) else f"via {address(int(port))} onlink"
        return f"route add {address(target)}/32 {via} dev to-{port} src {address(host)}"

    def _shaper(self, port: str) -> list[str]:
        # Acknowledgements go first. Behind a full queue of data they come late, and the sender of traffic the other way
        # stops to wait for them: bbr lost a tenth to a half of the rate to that, reno little.
        return [
            f"qdisc add dev to-{port} root handle 1: htb default 20",
            *self._classes("add", port),
            f"qdisc add dev to-{port} parent 1:20 pfifo limit 10000",  # more packets than TCP's windows: none is lost
            f"filter add dev to-{port} parent 1: protocol ip prio 1 u32 {ACKNOWLEDGEMENT} flowid 1:10",
        ]

    def _classes(self, verb: str, port: str) -> list[str]:
        def line(parent: str, number: int, share: float, priority: int) -> str:
            rate = f"rate {share * self.mbit_per_s}mbit ceil {self.mbit_per_s}mbit burst {BURST} cburst {BURST}"
            kind = f"htb {rate} prio {priority} quantum 60000"
            return f"class {verb} dev to-{port} parent {parent} classid 1:{number} {kind}"

        return [line("1:", 1, 1, 0), line("1:1", 10, 0.5, 0), line("1:1", 20, 0.5, 1)]

    def _end_processes(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for node in self.ports:  # and whatever those had started
            while pids := _run("ip", "netns", "pids", self.prefix + node).split():
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)

    def _remove(self, node: str) -> None:
        if (NAMESPACES / (self.prefix + node)).exists():  # not if its making was interrupted
            _run("ip", "netns", "del", self.prefix + node)


class Served:
    """`script --serve` on every host of a network: it joins the others and says a line; then it reads jobs, a line of
    JSON each, and answers each with a line of JSON.
    """

    def __init__(self, network: Network, script: str) -> None:
        self.network = network
        command = [sys.executable, "-P", script, "--serve"]
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # it warns that hosts have no names
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.processes = [network.popen(host, command, quiet, **pipes) for host in range(network.num_hosts)]
        self._lines()

    def answers(self, job: Mapping[str, Any]) -> list[Any]:
        """Every host's, to a job that all have got."""
        for process in self.processes:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        return [json.loads(line) for line in self._lines()]

    def _lines(self) -> list[str]:
        lines = [process.stdout.readline() for process in self.processes]
        if "" in lines:
            raise RuntimeError(f"host {lines.index('')} ended, see its error above")
        return lines


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _batch(tool: str, namespace: str, lines: list[str]) -> None:
    _run(tool, "-n", namespace, "-batch", "-", text="".join(f"{line}\n" for line in lines))
