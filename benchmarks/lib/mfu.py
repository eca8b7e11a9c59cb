"""Model FLOP utilization: a rate as a share of what the data sheet of the device names."""

from __future__ import annotations

import re

import torch

from .script import Row

PEAK_FLOPS = {
    # https://www.nvidia.com/en-us/data-center/h100/: 1,979, 1,671 and 1,513 TFLOPS with sparsity
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H100 NVL": 835e12,
    r"NVIDIA H100 PCIe": 756e12,
    # https://www.nvidia.com/en-us/data-center/h200/, H200 SXM: 1,979 TFLOPS with sparsity
    r"NVIDIA H200": 989e12,
    # https://www.nvidia.com/en-us/data-center/a100/: 312 TFLOPS, 624 with sparsity, in every form
    r"NVIDIA A100\b.*": 312e12,
    # https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703: HGX B200 4.5, GB200 5 PFLOPS with sparsity
    r"NVIDIA B200": 2250e12,
    r"NVIDIA GB200": 2500e12,
}
"""Dense bf16 FLOP/s of NVIDIA's data sheets, half of those with sparsity, by a pattern of the device's whole name. MFU
is told for these devices alone."""


def mfu(rate: float) -> Row:
    """Return the share of the data sheet's FLOP/s, where this device's are known."""
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {"mfu": rate / peak} if peak else {}


def peak_flops(name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device's data sheet; None: they are not known here."""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)
