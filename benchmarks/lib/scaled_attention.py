"""Attention of a cluster of H100 scaled down to the lab network: messages are real, and tiles are waits.

512 tokens a rank stand for 8,192, and documents are 16 times shorter. A wait is so long that a row of keys on a port of
50 Mbit/s takes as much of a row's computation as on 50 GB/s beside 500 TFLOP/s (forward; 350 backward). Ranks do not
take cores from each other, and the busiest one shows.
"""

from __future__ import annotations

import time

from longring.parallel.cp import cost, topology
from longring.parallel.cp.plan import Pass

from .lab_network import PAYLOAD_SHARE

MBIT_PER_S = 50
TOKENS = 512
LATENCY_S = 5e-4
"""Assumed latency of a message."""
SCALE = 16
"""Documents are shorter than those of 8,192 tokens a rank by this factor."""
SHAPE = cost.AttentionShape(8, 2, 64, itemsize=4)
KEY_BYTES = 2 * 8 * 128 * 2
"""Bytes of a row of keys and values of the model that is scaled down: 8 kv heads of 128 in 16 bit."""
BYTES_PER_S = MBIT_PER_S * 1e6 / 8 * PAYLOAD_SHARE
SLOWER = (2 * SHAPE.num_kv_heads * SHAPE.head_dim * SHAPE.itemsize / BYTES_PER_S) / (KEY_BYTES / 50e9)
"""Seconds of a row of keys here over those of a port of 50 GB/s."""
PAIR_S = SLOWER * SCALE * 4 * 128 * 32 / 500e12
"""Seconds of a visible pair in the forward."""
WAITS: dict[Pass, float] = {"forward": PAIR_S, "backward": PAIR_S * (10 / 350) / (4 / 500)}
SPEED = cost.Speed(
    4 * SHAPE.head_dim * SHAPE.num_heads / WAITS["forward"], 10 * SHAPE.head_dim * SHAPE.num_heads / WAITS["backward"]
)


def links(size: int) -> topology.Topology:
    """Return the links of `size` ranks behind a switch."""
    return topology.Topology("switch", size, topology.Fabric("switch", BYTES_PER_S, LATENCY_S))


def let_tiles_wait() -> None:
    """Make every tile of this process a wait, as long as its visible pairs and heads take."""
    from longring.parallel.cp import execute, visible  # imports torch, which the driver does not need

    def wait(q, mask, direction: Pass) -> None:
        time.sleep(mask.num_pairs * q.shape[2] / SHAPE.num_heads * WAITS[direction])  # q: [b, s, heads, d]

    execute.attention_forward = lambda q, k, v, mask, **_: wait(q, mask, "forward")  # type: ignore[assignment]
    execute.attention_backward = lambda dout, q, k, v, lse, delta, mask, **_: wait(q, mask, "backward")  # type: ignore[assignment]
    visible.GAP = visible.GAP // SCALE
