"""Hosts as network namespaces: what is sent is counted where it passes, and nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lib import lab_network
from lib.lab_network import PAYLOAD_SHARE, Network, address, from_hosts

needs_root = pytest.mark.skipif(lab_network.unavailable() is not None, reason=str(lab_network.unavailable()))
NUM_BYTES = 600_000
RECEIVE = """
import socket
with socket.create_server(("", 5000)) as server:
    print(flush=True)
    connection, peer = server.accept()
    print(peer[0], sum(iter(lambda: len(connection.recv(2**16)), 0)), flush=True)
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000)) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
"""


def namespaces_of(prefix: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if line.startswith(prefix)]


def send(network: Network, source: int, target: int) -> dict[tuple[str, str], int]:
    """Bytes counted while NUM_BYTES go over a TCP connection."""
    pipe = {"stdout": subprocess.PIPE, "text": True}
    receiver = network.popen(target, [sys.executable, "-c", RECEIVE], **pipe)
    assert receiver.stdout.readline()
    before = network.sent_bytes()
    network.popen(source, [sys.executable, "-c", SEND, address(target), str(NUM_BYTES)]).wait()
    assert receiver.stdout.readline().split() == [address(source), str(NUM_BYTES)]
    receiver.wait()
    return network.sent_bytes() - before


@needs_root
@pytest.mark.parametrize(
    ("fabric", "num_hosts", "source", "target", "links"),
    [
        ("switch", 3, 0, 2, [("0", "switch"), ("switch", "2")]),
        ("mesh", 3, 2, 0, [("2", "0")]),
        ("ring", 3, 2, 0, [("2", "0")]),
        ("ring", 5, 1, 3, [("1", "2"), ("2", "3")]),
        ("ring", 5, 1, 4, [("0", "4"), ("1", "0")]),
        ("ring", 2, 0, 1, [("0", "1")]),
    ],
)
def test_bytes_are_counted_on_the_links_they_pass(fabric, num_hosts, source, target, links):
    with Network(fabric, num_hosts, mbit_per_s=200) as network:
        sent = send(network, source, target)
    full = {link: count for link, count in sent.items() if count > NUM_BYTES / 10}
    assert sorted(full) == links
    assert all(sent[there, here] > 0 for here, there in links), "acknowledgements are counted too"
    assert network.num_hops(source, target) == sum(node != "switch" for node, _ in links)
    for count in full.values():
        assert 1 <= count * PAYLOAD_SHARE / NUM_BYTES < 1.03


@needs_root
def test_what_left_hosts_is_counted_once():
    with Network("switch", 3, mbit_per_s=200) as network:
        before = network.sent_bytes()
        send(network, 0, 1)
        sent = network.sent_bytes() - before
    assert 1 <= from_hosts(sent) * PAYLOAD_SHARE / NUM_BYTES < 1.05
    assert 1.9 < sent.total() / from_hosts(sent) < 2.1


def class_bytes(network: Network, node: int, port: int) -> dict[str, int]:
    command = ["tc", "-n", f"{network.prefix}{node}", "-s", "class", "show", "dev", f"to-{port}"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(count) for name, count in re.findall(r"class htb (\S+) .*\n Sent (\d+) bytes", told)}


@needs_root
def test_acknowledgements_go_first_and_data_does_not():
    with Network("mesh", 2, mbit_per_s=200) as network:
        send(network, 0, 1)
        forth, back = class_bytes(network, 0, 1), class_bytes(network, 1, 0)
        sent = network.sent_bytes()
    assert forth["1:20"] > NUM_BYTES > 100 * forth["1:10"]
    assert back["1:10"] > back["1:20"] > 0  # besides, the handshake's
    assert sent["0", "1"] >= forth["1:10"] + forth["1:20"] and sent["1", "0"] >= back["1:10"] + back["1:20"]


@needs_root
@pytest.mark.parametrize(("fabric", "num_ports"), [("mesh", 12), ("ring", 8), ("switch", 8)])
def test_every_port_has_the_rate(fabric, num_ports):
    def rates(network: Network) -> list[str]:
        """The most that each class of each port may have."""
        found = []
        for node, ports in network.ports.items():
            for port in ports:
                command = ["tc", "-n", network.prefix + node, "class", "show", "dev", f"to-{port}"]
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found += [line.split("ceil ")[1].split()[0] for line in told.splitlines()]
        return found

    with Network(fabric, 4, mbit_per_s=123) as network:
        assert rates(network) == ["123Mbit"] * 3 * num_ports
        network.set_rate(45)
        assert rates(network) == ["45Mbit"] * 3 * num_ports


@needs_root
def test_a_command_finds_the_environment_of_its_rank():
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    with Network("ring", 3, mbit_per_s=200) as network:
        pipe = {"stdout": subprocess.PIPE, "text": True}
        told = network.popen(2, [sys.executable, "-c", code], {"RANK_OF_OURS": "yes"}, **pipe)
        found = json.loads(told.communicate()[0])
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("2", "3", "0")
    assert found["MASTER_ADDR"] == address(0)
    assert found["GLOO_SOCKET_IFNAME"] in ("to-0", "to-1")
    assert found["RANK_OF_OURS"] == "yes" and found["PATH"] == os.environ["PATH"]


@needs_root
@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt])
def test_nothing_stays_behind(failure):
    other = Network("switch", 2, mbit_per_s=200)
    network = Network("ring", 3, mbit_per_s=200)
    starts_another = "import subprocess; subprocess.Popen(['sleep', '1000']); print(flush=True)"

    def work() -> None:
        with network:
            assert len(namespaces_of(network.prefix)) == 3
            sleeper = network.popen(0, ["sleep", "1000"])
            parent = network.popen(1, [sys.executable, "-c", starts_another], stdout=subprocess.PIPE)
            assert parent.stdout.readline()
            listed = subprocess.run(
                ["ip", "netns", "pids", network.prefix + "1"], capture_output=True, text=True
            ).stdout
            orphans.extend(int(pid) for pid in listed.split() if int(pid) != parent.pid)
            assert sleeper.poll() is None
            if failure:
                raise failure

    orphans: list[int] = []
    with other:
        if failure:
            with pytest.raises(failure):
                work()
        else:
            work()
        assert namespaces_of(network.prefix) == []
        assert len(namespaces_of(other.prefix)) == 3
        assert all(process.returncode is not None for process in network.processes)
        assert len(orphans) == 1
        deadline = time.monotonic() + 10  # killed, but its new parent may take a moment to see it
        while Path(f"/proc/{orphans[0]}/ns/net").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        state = Path(f"/proc/{orphans[0]}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"
        send(other, 0, 1)
    assert namespaces_of(other.prefix) == []


@needs_root
def test_a_build_that_fails_leaves_nothing(monkeypatch):
    monkeypatch.setattr(lab_network, "BURST", "nonsense")
    network = Network("mesh", 3, mbit_per_s=200)
    with pytest.raises(RuntimeError, match="burst"):
        network.__enter__()
    assert namespaces_of(network.prefix) == []


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="ip and tc not found: install iproute2"), Network("ring", 3, 100):
        pass


def test_missing_rights_are_said(monkeypatch):
    monkeypatch.setattr(lab_network, "CAPABILITIES", lab_network.CAPABILITIES | 1 << 62)
    monkeypatch.setattr(lab_network.shutil, "which", lambda tool: tool)
    with pytest.raises(RuntimeError, match="need root"), Network("ring", 3, 100):
        pass


@pytest.mark.parametrize("arguments", [("star", 3, 100), ("ring", 1, 100), ("mesh", 3, 0)])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="fabric .*num_hosts .*mbit_per_s"):
        Network(*arguments)
