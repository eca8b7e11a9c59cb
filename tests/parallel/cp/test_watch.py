"""The watch over messages for which only a GPU waits."""

from __future__ import annotations

import threading

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
    """The watch looks at the oldest message alone: that it looks at the second shows that it forgot the first."""
    ended, come, looked, second = (threading.Event() for _ in range(4))
    watch = Watch(60, end=lambda status: ended.set())

    def is_first_done() -> bool:
        looked.set()
        return come.is_set()

    watch.expect(is_first_done, lambda: "first")
    watch.expect(lambda: second.set() or True, lambda: "second")
    watch.start()
    assert looked.wait(60)
    assert len(watch.expected) == 2, "a message that has not arrived must be kept"
    come.set()
    assert second.wait(60)
    assert not ended.is_set()
