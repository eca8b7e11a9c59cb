"""Model FLOP utilization: a rate as a share of what the data sheet of the device names."""

from __future__ import annotations

import torch

from .script import Row

PEAK_FLOPS = {
    **{"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H800 PCIe": 756e12},
    **{"H100": 989e12, "H200": 989e12, "H800": 989e12, "H20": 148e12},
    **{"A100": 312e12, "A800": 312e12, "GB200": 2500e12, "B200": 2250e12},
}
"""Dense bf16 FLOP/s of the data sheets by a part of the device's name, of which the first that fits counts; MFU is told
for these devices alone."""


def mfu(rate: float) -> Row:
    """Return the share of the data sheet's FLOP/s, where this device's are known."""
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {"mfu": rate / peak} if peak else {}


def peak_flops(name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device's data sheet; None: they are not known here."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
