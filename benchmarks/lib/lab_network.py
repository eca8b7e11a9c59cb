"""A lab network: hosts on one machine, joined by shaped, full-duplex links, so that links and not cores are scarce.

    with Network("ring", num_hosts=4, mbit_per_s=200) as network:
        ranks = [network.popen(host, [sys.executable, "rank.py"]) for host in range(4)]
        before = network.sent_bytes()
        ...
        sent = network.sent_bytes() - before            # bytes by (from, to)

A host is a network namespace; rank.py calls torch.distributed.init_process_group("gloo"). Fabrics: a mesh has a link
for every pair; a ring has links to the two neighbours, which forward other traffic the shorter way; a switch has one
port a host, limited in each direction. Needs root and iproute2. `python benchmarks/gloo_links.py` measures the rates
that gloo reaches on it, and the rate up to which a machine keeps all links full.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, get_args

Fabric = Literal["mesh", "ring", "switch"]

FABRICS: tuple[Fabric, ...] = get_args(Fabric)
SWITCH = "switch"
PAYLOAD_SHARE = 1448 / 1514
"""Share of a full Ethernet frame that is data of TCP with timestamps."""
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
"""Bytes that an idle link may send at once. With less, a late timer of a busy machine costs rate."""
ACKNOWLEDGEMENT = "match u16 0x0000 0xff80 at 2 match u8 0x10 0xff at 33"
"""Filter for IP packets below 128 bytes with the TCP flag ACK alone; data is left out, as it must stay in order."""


def unavailable() -> str | None:
    """Return why this machine cannot hold a lab network and a way out, or None if it can."""
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} not found: install iproute2"
    [granted] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")]
    if int(granted.split()[1], 16) & CAPABILITIES != CAPABILITIES:
        return "network namespaces need root: use sudo, or a container with --cap-add NET_ADMIN --cap-add SYS_ADMIN"
    return None


def address(host: int) -> str:
    """Return the IP address of a host, the same on all its ports."""
    return f"10.77.0.{host + 1}"


def from_hosts(sent: Mapping[tuple[str, str], int]) -> int:
    """Return the bytes of `sent_bytes` that left hosts; a switch counts the same bytes again."""
    return sum(count for (source, _), count in sent.items() if source != SWITCH)


class Network:
    """Namespaces, links and processes, built on entering and removed on leaving.

    A process that is killed leaves its namespaces, `longring-PID-...` of `ip netns list`; `ip netns del` removes them.
    """

    def __init__(self, fabric: Fabric, num_hosts: int, mbit_per_s: float) -> None:
        """Describe hosts 0 to num_hosts - 1; the rate holds for each link and direction, headers included.

        Raises ValueError if the fabric is unknown, or the number of hosts or the rate is out of range.
        """
        if fabric not in FABRICS or not 2 <= num_hosts <= 250 or mbit_per_s <= 0:
            raise ValueError(
                f"fabric = {fabric!r}, num_hosts = {num_hosts}, mbit_per_s = {mbit_per_s}: no such network; "
                f"take one of {', '.join(FABRICS)}, 2 to 250 hosts and a rate above 0"
            )
        self.fabric: Fabric = fabric
        self.num_hosts, self.mbit_per_s = num_hosts, mbit_per_s
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
        """The other ends of the links of each host and of the switch. A device is called `to-` and the other end."""
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
        """Start a command on a host, as rank `host` of torch.distributed, and return its subprocess.Popen.

        `env` is added to this process's environment; options are those of Popen. The process ends with the network.
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
        """Return the bytes that every link has carried, by (from, to), where "0" is host 0 and "switch" the switch.

        The kernel counts the bytes that its shaper lets pass: headers and acknowledgements are in it, and bytes that a
        ring forwards are counted on each link. The difference of two counts is `network.sent_bytes() - before`.
        """
        sent: Counter[tuple[str, str]] = Counter()
        for node in self.ports:
            for qdisc in json.loads(_run("tc", "-n", self.prefix + node, "-json", "-s", "qdisc", "show")):
                if qdisc["kind"] == "htb":
                    sent[node, qdisc["dev"].removeprefix("to-")] = qdisc["bytes"]
        return sent

    def set_rate(self, mbit_per_s: float) -> None:
        """Set the rate of all links from now on."""
        self.mbit_per_s = mbit_per_s
        for node, ports in self.ports.items():
            _batch("tc", self.prefix + node, [line for port in ports for line in self._classes("change", port)])

    def next_hop(self, host: int, target: int) -> str:
        """Return the other end of the link on which `host` sends to `target`."""
        if self.fabric == "ring":
            onwards = (target - host) % self.num_hosts <= self.num_hosts // 2
            return str((host + (1 if onwards else -1)) % self.num_hosts)
        return str(target) if self.fabric == "mesh" else SWITCH

    def num_hops(self, source: int, target: int) -> int:
        """Return the number of links between two hosts; the two of a switch count as one."""
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
        for node in self.ports:  # and the processes that those have started
            while pids := _run("ip", "netns", "pids", self.prefix + node).split():
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)

    def _remove(self, node: str) -> None:
        if (NAMESPACES / (self.prefix + node)).exists():  # it does not if its making was interrupted
            _run("ip", "netns", "del", self.prefix + node)


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _batch(tool: str, namespace: str, lines: list[str]) -> None:
    _run(tool, "-n", namespace, "-batch", "-", text="".join(f"{line}\n" for line in lines))
