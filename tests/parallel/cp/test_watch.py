"""The watch over messages for which only a GPU waits."""

from __future__ import annotations

import threading
import time

from longring.parallel.cp.group import Watch


def test_an_overdue_message_ends_the_process_and_is_named(capfd):
    ended = threading.Event()
    watch = Watch(0.2, end=lambda status: ended.set())
    watch.expect(lambda: True, lambda: "a message that has arrived")
    watch.expect(lambda: False, lambda: "keys of grid position 3")
    watch.start()
    assert ended.wait(10)
    error = capfd.readouterr().err
    assert "keys of grid position 3" in error
    assert "a message that has arrived" not in error


def test_messages_that_come_in_time_are_forgotten():
    ended = threading.Event()
    watch = Watch(0.5, end=lambda status: ended.set())
    watch.start()
    for _ in range(5):
        come = time.monotonic() + 0.1
        watch.expect(lambda come=come: time.monotonic() > come, lambda: "late")
        time.sleep(0.2)
    assert not ended.is_set()
    assert not watch.expected
