"""The loops of `simulate`, compiled: a loader's thread runs them without Python's lock, some nanoseconds a message."""

from __future__ import annotations

import numpy as np

from ...kernels.host_loop import host_loop


@host_loop
def walk_halves(
    sent,
    source,
    target,
    posted,
    due,
    num_bytes,
    links,
    bytes_per_s,
    latency_s,
    half,
    rank,
    seconds,
    num_ranks,
    num_links,
):  # pragma: no cover  (compiled)
    """Return `simulate.Times` for the columns of `simulate.Traffic` and `simulate.Tiles`.

    `sent` are the indices of the messages that have bytes, `[n]`.
    """
    num_halves = 1 + max(due.max() if len(due) else 0, half[-1] if len(half) else 0)
    ready, free = np.zeros(num_ranks), np.zeros(num_links)  # free: time at which a link has carried all so far
    came = np.zeros((num_halves, num_ranks))  # latest arrival of the messages that a rank waits for
    begins, arrival, computed = np.zeros(len(posted)), np.zeros(len(posted)), np.zeros(len(half))
    # Messages of the present half on each link: the number not yet looked at, and the bytes of the others.
    waiting, carried = np.zeros(num_links, np.int64), np.zeros(num_links)
    message, tile = 0, 0
    for now in range(num_halves):
        for r in range(num_ranks):
            ready[r] = max(ready[r], came[now, r])
        first, shared = message, False
        while message < len(sent) and posted[sent[message]] == now:
            for link in links[sent[message]]:
                if link < num_links:
                    waiting[link] += 1
                    shared |= waiting[link] > 1
            message += 1
        order = sent[first:message]
        if shared:
            order = order[np.argsort(num_bytes[order])]
        # Lightest first: a link that is shared evenly has carried a message of weight w when it has carried
        # min(w, weight) of every message on it, the whole of the lighter ones and w of each of the others.
        for m in order:
            busy, at = 0.0, max(ready[source[m]], ready[target[m]])  # both ends must have posted
            for link in links[m]:
                if link < num_links:
                    busy = max(busy, carried[link] + num_bytes[m] * waiting[link])
                    waiting[link] -= 1
                    carried[link] += num_bytes[m]
                    at = max(at, free[link])
            begins[m], arrival[m] = at, at + busy / bytes_per_s[m]
        for m in order:
            for link in links[m]:
                if link < num_links:
                    free[link], carried[link] = max(free[link], arrival[m]), 0.0
            arrival[m] += latency_s[m]
            came[due[m], source[m]] = max(came[due[m], source[m]], arrival[m])
            came[due[m], target[m]] = max(came[due[m], target[m]], arrival[m])
        while tile < len(half) and half[tile] == now:
            computed[tile] = ready[rank[tile]] + seconds[tile]
            ready[rank[tile]] = computed[tile]
            tile += 1
    return ready, begins, arrival, computed


@host_loop
def bytes_of_links(num_bytes, links, num_links):  # pragma: no cover  (compiled)
    """Return the bytes that each link carries, `[links]`, for two columns of `simulate.Traffic`."""
    carried = np.zeros(num_links + 1)  # the last one: links that a message lacks
    for message in range(len(num_bytes)):
        if num_bytes[message] > 0:
            for number in range(links.shape[1]):
                carried[links[message, number]] += num_bytes[message]
    return carried[:-1]
