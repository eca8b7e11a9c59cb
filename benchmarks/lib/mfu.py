"""Model FLOP utilization: a rate as a share of what the data sheet of the device names."""

from __future__ import annotations

import torch
from longring.launch.flops import peak_flops

from .script import Row


def mfu(rate: float) -> Row:
    """Return the share of the data sheet's FLOP/s, where this device's are known."""
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {"mfu": rate / peak} if peak else {}
