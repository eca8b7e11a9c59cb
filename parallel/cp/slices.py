"""The loops of `packed`, compiled: how many tokens of each document a rank gets, and which tokens these are."""

from __future__ import annotations

import numpy as np

from ...kernels.host_loop import host_loop


@host_loop
def hand_out(tokens, density, room):  # pragma: no cover  (compiled)
    """Return the slices that holders get, as three columns `[n]`: holder, part, number of tokens of that part.

    `tokens` and `density` are those of parts of documents, in the order in which they are given away, `room` the tokens
    of each holder. A part goes to the holder with the least work among those that have room for it, else a slice of it
    to the one with the most room.
    """
    room, work = room.copy(), np.zeros(len(room))
    found, count = np.empty((3, len(tokens) + len(room)), np.int64), 0  # a slice fills its holder
    for part in range(len(tokens)):
        left = tokens[part]
        while left > 0:
            least, most = -1, 0  # holders
            for holder in range(len(room)):
                if room[holder] >= left and (least < 0 or work[holder] < work[least]):
                    least = holder
                if room[holder] > room[most]:
                    most = holder
            holder = least if least >= 0 else most
            taken = min(room[holder], left)
            found[0, count], found[1, count], found[2, count] = holder, part, taken
            count += 1
            left -= taken
            room[holder] -= taken
            work[holder] += taken * density[part]
    return found[:, :count]


@host_loop
def even_out(tokens, density, first_part, room, first_rank):  # pragma: no cover  (compiled)
    """Return the slices that ranks get, as three columns `[n]`: rank, part, number of tokens of that part.

    Group g of the ranks, from `first_rank[g]` to before `first_rank[g + 1]`, divides the parts of documents from
    `first_part[g]` to before `first_part[g + 1]`, in order of `density`, as `packed.balanced` says. `room` has the
    tokens of each rank.
    """

    def work(stop, edges, works, densities):
        """Return the work of the first `stop` tokens of a line."""
        at = min(np.searchsorted(edges, stop, side="right"), len(densities)) - 1
        return works[at] + (stop - edges[at]) * densities[at]

    found, count = np.empty((3, len(tokens) + 2 * len(room)), np.int64), 0  # a rank cuts two parts at most
    for group in range(len(first_rank) - 1):
        begin, end = first_part[group], first_part[group + 1]
        line = density[begin:end]
        # By part: tokens and work of all before it in the line.
        edges, works = np.zeros(len(line) + 1, np.int64), np.zeros(len(line) + 1)
        edges[1:], works[1:] = np.cumsum(tokens[begin:end]), np.cumsum(tokens[begin:end] * line)
        first, last = 0, edges[-1]  # [first, last): the part of the line that is left
        for rank in range(first_rank[group], first_rank[group + 1]):
            below, above = work(first, edges, works, line), work(last, edges, works, line)
            share = (above - below) * room[rank] / (last - first)
            enough = share - share / room[rank] / 2  # within half the work of a token
            # The least number of tokens of the heavy end that make the work of the rank `enough`: [low, heavy].
            low, heavy = 0, room[rank]
            while low < heavy:
                middle = (low + heavy) // 2
                light_work = work(first + room[rank] - middle, edges, works, line) - below
                if light_work + above - work(last - middle, edges, works, line) >= enough:
                    heavy = middle
                else:
                    low = middle + 1
            for start, stop in ((first, first + room[rank] - heavy), (last - heavy, last)):
                at = np.searchsorted(edges, start, side="right") - 1  # part of the first token
                while start < stop:
                    until = min(stop, edges[at + 1])
                    found[0, count], found[1, count], found[2, count] = rank, begin + at, until - start
                    count += 1
                    start, at = until, at + 1
            first, last = first + room[rank] - heavy, last - heavy
    return found[:, :count]


@host_loop
def cut(document, tokens, start, stop, density, windows, layers):  # pragma: no cover  (compiled)
    """Return the two runs of each slice, `[slices, 2, 2]` as (start, stop); one may be empty.

    Slices of `tokens` are taken in their order, each from both ends of the positions [`start`, `stop`) of its
    `document` that are left. `windows` are the attention windows, each with its number of `layers`.
    """

    def pairs(num_tokens):
        """Return the visible pairs of the first tokens of a document, in all layers."""
        total = 0
        for number in range(len(windows)):
            rising = min(num_tokens, windows[number])  # tokens that see all before them
            total += layers[number] * (rising * (rising + 1) // 2 + (num_tokens - rising) * rising)
        return total

    shortest = windows.min()
    front, back = start.copy(), stop.copy()  # [front, back): positions of each document that are left
    found = np.empty((len(document), 2, 2), np.int64)
    for number in range(len(document)):
        of, taken = document[number], tokens[number]
        # Without an attention window it is half of the slice; an odd token is taken at the end.
        late = taken - taken // 2
        if shortest < stop[of] - start[of]:
            first, last = front[of] - start[of], back[of] - start[of]  # the same, within the document
            # The work of a slice rises with `late`, since no token has less work than one before. As in `even_out`.
            enough = density[of] * (taken - 0.5) - pairs(last) + pairs(first)
            low, late = 0, taken
            while low < late:
                middle = (low + late) // 2
                if pairs(first + taken - middle) - pairs(last - middle) >= enough:
                    late = middle
                else:
                    low = middle + 1
        found[number, 0, 0], found[number, 0, 1] = front[of], front[of] + taken - late
        found[number, 1, 0], found[number, 1, 1] = back[of] - late, back[of]
        front[of], back[of] = front[of] + taken - late, back[of] - late
    return found
