"""The loop of `needs` over the legs of a route, compiled."""

from __future__ import annotations

import numpy as np

from ...kernels.host_loop import host_loop


@host_loop
def lengths_of_hulls(first, stop, legs):  # pragma: no cover  (compiled)
    """Return, for each leg, the length of the hull of its range and of those of all legs before it.

    `first`, `stop` and the result are `[layouts, legs, owners]`; `legs` has the numbers of all legs in their order.
    """
    num_layouts, _, size = first.shape
    found = np.empty(first.shape)
    for layout in range(num_layouts):
        low, high = first[layout, legs[0]].copy(), stop[layout, legs[0]].copy()
        for leg in legs:
            for owner in range(size):
                low[owner] = min(low[owner], first[layout, leg, owner])
                high[owner] = max(high[owner], stop[layout, leg, owner])
                found[layout, leg, owner] = max(high[owner] - low[owner], 0)
    return found
