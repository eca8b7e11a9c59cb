"""The variables of torchrun are checked, and ranks that meet at a taken port end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from longring.parallel import meet
from longring.parallel.world import World
from torch._C._distributed_c10d import TCPStore

GOOD = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-1.cluster",
    "MASTER_PORT": "29500",
}


def test_the_variables_of_torchrun_are_read():
    assert World.from_environment(GOOD) == World(5, 8, 1, 4, "node-1.cluster", 29500, hosted=False)
    hosted = World.from_environment({**GOOD, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert hosted.hosted
    one_node = World.from_environment({name: value for name, value in GOOD.items() if name != "LOCAL_WORLD_SIZE"})
    assert one_node.local_size == 8


@pytest.mark.parametrize("name", [name for name in GOOD if name != "LOCAL_WORLD_SIZE"])
def test_a_missing_variable_is_named(name):
    with pytest.raises(ValueError, match=f"^{name}: not set in the environment; start with torchrun, or use the `long"):
        World.from_environment({key: value for key, value in GOOD.items() if key != name})


NUMBERS = [name for name in GOOD if name != "MASTER_ADDR"]
ABSURD = {
    **{
        (name, text): "must be a whole number" for name in NUMBERS for text in ("abc", "", "-1", "1.5", "٣", "9" * 5000)
    },
    ("WORLD_SIZE", "0"): "must be a whole number of at least 1",
    ("RANK", "8"): "must be a whole number from 0 to 7 = WORLD_SIZE - 1",
    ("LOCAL_RANK", "4"): "must be a whole number from 0 to 3 = the number of ranks on the node - 1",
    ("LOCAL_WORLD_SIZE", "0"): "must be a whole number from 1 to 8 = WORLD_SIZE",
    ("LOCAL_WORLD_SIZE", "9"): "must be a whole number from 1 to 8 = WORLD_SIZE",
    ("MASTER_PORT", "0"): "must be a whole number from 1 to 65535",
    ("MASTER_PORT", "65536"): "must be a whole number from 1 to 65535",
    ("MASTER_ADDR", ""): "is no name or address of a machine",
    ("MASTER_ADDR", "tcp://node"): "is no name or address of a machine",
    ("MASTER_ADDR", "a\nb"): "is no name or address of a machine",
}


@pytest.mark.parametrize(("name", "value"), ABSURD, ids=lambda value: value[:10])
def test_an_absurd_variable_is_named_in_one_line(name, value):
    with pytest.raises(ValueError, match=f"^{name} = ") as error:
        World.from_environment({**GOOD, name: value})
    assert ABSURD[name, value] in str(error.value)
    assert str(error.value).endswith("; start with torchrun, or use the `longring` command")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 200


@contextmanager
def listener(answer: bytes | None) -> Iterator[int]:
    """Listen at a port and answer every connection, or with None leave it without an answer."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                    with connection:
                        connection.sendall(answer or b"")
                except OSError:  # the test is over, or the other side has gone
                    if listening.fileno() < 0:
                        return

        if answer is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


ANSWERS = {"silent": None, "closes": b"", "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n"}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_rank_does_not_wait_for_a_listener_that_is_no_store(answer, monkeypatch):
    monkeypatch.setattr(meet, "ANSWER_S", 0.5)
    with (
        listener(ANSWERS[answer]) as port,
        pytest.raises(ConnectionError, match="is not of this start; name the first"),
    ):
        meet.reach("MASTER_PORT = 1", "127.0.0.1", port, timedelta(minutes=10))


def test_a_rank_waits_for_an_address_until_its_timeout():
    with pytest.raises(ConnectionError, match=r"^--rendezvous x:1: cannot be reached: .*; name the first machine"):
        meet.reach("--rendezvous x:1", "127.0.0.1", 1, timedelta(seconds=0.5))
    with pytest.raises(ConnectionError, match="no machine has this name"):
        meet.reach("--rendezvous x:1", "no-such-machine.invalid", 1, timedelta(minutes=10))


def world(rank: int, size: int, port: int) -> World:
    return World(rank, size, rank, size, "127.0.0.1", port, hosted=False)


def test_a_rank_does_not_join_the_store_of_another_start(monkeypatch):
    """The store of another program, of a start with another number of ranks, or one that has met this rank."""
    monkeypatch.setattr(meet, "ANSWER_S", 0.5)
    wait = timedelta(minutes=10)
    other = TCPStore("127.0.0.1", 0, None, True, wait, wait_for_workers=False)
    with pytest.raises(ConnectionError, match="is not of this start"):
        meet._visit(world(1, 2, other.port), wait)
    ours = meet._host(world(0, 2, free_port()), wait)
    assert meet._visit(world(1, 2, ours.port), wait).get("world") == b"2"
    for rank, size in ((1, 2), (2, 3)):
        with pytest.raises(ConnectionError, match="is not of this start"):
            meet._visit(world(rank, size, ours.port), wait)
    with pytest.raises(
        ConnectionError, match="the port is in use here; name the first machine and a port that is free"
    ):
        meet._host(world(0, 2, ours.port), wait)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
