"""Rates that gloo reaches on the lab network, beside the rates set for its links.

    python benchmarks/gloo_links.py --json rows.json   # 2 to 3 minutes
    python benchmarks/gloo_links.py --quick            # half a minute

Needs root and iproute2. Messages of 2 MB go between neighbours and, in a ring, between opposite hosts: one way, two
ways by one process group or by one for each direction, and on all links at once. A time is the median of repeats, each
that of its slowest host. "share" is the rate of data over the link's rate without headers; "counted" is the links'
count of bytes over the bytes of the messages with their headers. Both are 1 where all is well. Last, rates are raised
until all links at once no longer reach a share of 0.95; on a machine that others use this is a lower bound.

gloo sends a message when its receiver has said that it waits. Where sends are posted first, that word comes late: over
one group it queues behind the data that goes the same way.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.lab_hosts import LabHosts
from lib.lab_network import FABRICS, PAYLOAD_SHARE, Fabric, Network, from_hosts, unavailable
from lib.script import Row, Size, make_parser, make_table, refuse, write_record
from rich.console import Console

Message = tuple[int, int, int]
"""Source, target, and the index of one of two process groups."""

SENDS_FIRST = "sends first"
MESSAGE_BYTES = 2_000_000
ENOUGH = 0.95
CLIMB_MBIT_PER_S = (100, 150, 200, 300, 400, 600, 800, 1200, 1600)


def patterns(fabric: Fabric, n: int) -> dict[str, list[Message]]:
    """Return by name the messages that travel at once; receives are posted first unless the name says otherwise."""
    found = {"one way": [(0, 1, 0)], "two ways, two groups": [(0, 1, 0), (1, 0, 1)]}
    found |= {name: [(0, 1, 0), (1, 0, 0)] for name in ("two ways, one group", f"two ways, one group, {SENDS_FIRST}")}
    if fabric == "ring":
        found["opposite, one way"] = [(0, n // 2, 0)]
        found["opposite, two groups"] = [(0, n // 2, 0), (n // 2, 0, 1)]
    return found | {name: all_links(fabric, n) for name in (f"all links, {SENDS_FIRST}", "all links")}


def all_links(fabric: Fabric, n: int) -> list[Message]:
    """Return one message for every link and direction."""
    if fabric == "mesh":
        return [(i, j, int(i < j)) for i in range(n) for j in range(n) if i != j]
    onwards = [(i, (i + 1) % n, 0) for i in range(n)]
    return onwards + [(j, i, 1) for i, j, _ in onwards] if fabric == "ring" else onwards


def serve() -> int:
    """Be a host: join the others, do the job of each line of the input, and answer with the seconds of each repeat."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups, rank = [dist.new_group() for _ in range(2)], dist.get_rank()
    print(flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        seconds = []
        mine = [[message for message in messages if rank in message[:2]] for messages in job["rounds"]]
        for messages in mine:
            messages.sort(key=lambda message: message[0] == rank, reverse=job["sends_first"])
        buffers = [torch.zeros(job["bytes"], dtype=torch.uint8) for messages in mine for _ in messages]
        dist.barrier()
        for _ in range(job["repeats"]):
            started, free = time.perf_counter(), iter(buffers)
            for messages in mine:
                pending = []
                for source, target, group in messages:
                    transfer, peer = (dist.isend, target) if source == rank else (dist.irecv, source)
                    pending.append(transfer(next(free), peer, group=groups[group]))
                for work in pending:
                    work.wait()
            seconds.append(time.perf_counter() - started)
        dist.barrier()
        print(json.dumps(seconds), flush=True)
    return 0


class Hosts(LabHosts):
    """The hosts of a network, each in `serve`."""

    def seconds(self, rounds: list[list[Message]], num_bytes: int, repeats: int, *, sends_first: bool = False) -> float:
        """Return the median of the repeats, each the time of the slowest host; rounds follow one another."""
        job = {"rounds": rounds, "bytes": num_bytes, "repeats": repeats, "sends_first": sends_first}
        return median(max(times) for times in zip(*self.answers(job), strict=True))

    def row(self, pattern: str, messages: list[Message], repeats: int) -> Row:
        """Return the time of a pattern, and the links' count of bytes over that expected."""
        network = self.network
        before = network.sent_bytes()
        seconds = self.seconds([messages], MESSAGE_BYTES, repeats, sends_first=pattern.endswith(SENDS_FIRST))
        counted = from_hosts(network.sent_bytes() - before)
        carried = repeats * MESSAGE_BYTES * sum(network.num_hops(source, target) for source, target, _ in messages)
        mbit_per_s = 8e-6 * MESSAGE_BYTES / seconds
        return {
            "fabric": network.fabric,
            "num_hosts": network.num_hosts,
            "link_mbit_per_s": network.mbit_per_s,
            "pattern": pattern,
            "ms": round(1e3 * seconds, 2),
            "mbit_per_s": round(mbit_per_s, 1),
            "share": round(mbit_per_s / (network.mbit_per_s * PAYLOAD_SHARE), 3),
            "counted": round(counted * PAYLOAD_SHARE / carried, 3),
        }


@contextmanager
def hosts_of(fabric: Fabric, num_hosts: int) -> Iterator[Hosts]:
    """Build a network and start its hosts; they have sent messages on every link."""
    with Network(fabric, num_hosts, mbit_per_s=1000) as network:
        hosts = Hosts(network, __file__)
        hosts.seconds([all_links(fabric, num_hosts)], MESSAGE_BYTES, 2)  # connections are made, and their windows grow
        yield hosts


def round_trip_row(hosts: Hosts) -> Row:
    """Return the time of a message of 8 bytes from host 0 to host 1 and one back."""
    network = hosts.network
    ms = round(1e3 * hosts.seconds([[(0, 1, 0)], [(1, 0, 0)]], 8, 50), 3)
    known = {"fabric": network.fabric, "num_hosts": network.num_hosts, "link_mbit_per_s": network.mbit_per_s}
    return known | {"pattern": "round trip of 8 bytes", "ms": ms}


def highest_rate(hosts: Hosts, rates: tuple[int, ...]) -> Row:
    """Return the last of ascending rates of which all links at once reach `ENOUGH`, in one of two tries."""
    network, reached = hosts.network, 0
    for rate in rates:
        network.set_rate(rate)
        messages = all_links(network.fabric, network.num_hosts)
        tries = (hosts.row("", messages, 6)["share"] for _ in range(2))
        if not any(share >= ENOUGH for share in tries):
            break
        reached = rate
    known = {"fabric": network.fabric, "num_hosts": network.num_hosts, "link_mbit_per_s": reached}
    return known | {"pattern": "all links, highest rate"}


def measure(size: Size) -> Iterator[Row]:
    """Yield all rows as they are measured."""
    if size == "smallest":
        with hosts_of("ring", 2) as hosts:
            yield hosts.row("one way", [(0, 1, 0)], 1)
            yield round_trip_row(hosts)
            yield highest_rate(hosts, CLIMB_MBIT_PER_S[:1])
        return
    full = size == "full"
    for fabric in FABRICS:
        with hosts_of(fabric, 4) as hosts:
            for rate in (50, 200) if full else (200,):
                hosts.network.set_rate(rate)
                for pattern, messages in patterns(fabric, 4).items():
                    yield hosts.row(pattern, messages, 8 if full else 4)
                yield round_trip_row(hosts)
            yield highest_rate(hosts, CLIMB_MBIT_PER_S)
        if full:
            with hosts_of(fabric, 8) as hosts:
                yield highest_rate(hosts, CLIMB_MBIT_PER_S)


def main() -> int:
    options = make_parser(__doc__ or "", quick="4 hosts, one rate, half a minute").parse_args()
    if reason := unavailable():
        return refuse(reason)
    console = Console(width=100)
    columns = ("fabric", "hosts", "link", "pattern", "ms", "data", "share", "counted")
    table = make_table("Messages of 2 MB; rates of links and data in Mbit/s", columns, left=("fabric", "pattern"))
    rows = []
    with console.status("measuring") as status:
        for row in measure(options.size):
            rows.append(row)
            table.add_row(*(f"{x:.3f}" if name in ("share", "counted") else str(x) for name, x in row.items()))
            status.update(" ".join(map(str, row.values())))
    console.print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else main())
