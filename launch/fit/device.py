"""Limits of a device, of data sheets or measured, and the share of them that training is taken to reach."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from ...parallel.cp.cost import Speed
from ...parallel.cp.speeds import speed_of
from ...parallel.cp.topology import Fabric, Topology
from ..flops import peak_flops
from .memory import device_bytes

PRODUCT_SHARE = 0.7
"""Share of the peak FLOP/s that large matrix products are assumed to reach; not measured."""
MEMORY_SHARE = 0.8
"""Share of a memory's bandwidth that operators of one pass over their tensors are assumed to reach; not measured."""
LINK_SHARE = 0.8
"""Share of a link's bandwidth that collectives reach: NCCL's authors name 370 of 450 GB/s inside an H100 node
(github.com/NVIDIA/nccl-tests/issues/212), and 46 to 48 of 50 GB/s across (.../290). Copies to the host: assumed."""
HOST_MEMORY_BYTES_PER_S = 40e9
"""Bandwidth of the host's memory that one of a node's ranks is assumed to get, where AdamW steps there."""


class Sheet(NamedTuple):
    """Figures of a data sheet in bytes/s; `flops` and `memory` have the FLOP/s and the memory by the whole name."""

    name: str
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """NVLink, one direction."""
    host_bytes_per_s: float
    """PCIe, one direction."""


SHEETS = {
    # https://www.nvidia.com/en-us/data-center/a100/: 2,039 GB/s; NVLink 600 and PCIe 64 GB/s, both directions
    "a100": Sheet("NVIDIA A100-SXM4-80GB", 2039e9, 300e9, 32e9),
    # https://www.nvidia.com/en-us/data-center/h100/, H100 SXM: 3.35 TB/s; NVLink 900 and PCIe 128 GB/s, both directions
    "h100": Sheet("NVIDIA H100 80GB HBM3", 3.35e12, 450e9, 64e9),
    # https://www.nvidia.com/en-us/data-center/h200/, H200 SXM: 4.8 TB/s; NVLink 900 and PCIe 128 GB/s, both directions
    "h200": Sheet("NVIDIA H200", 4.8e12, 450e9, 64e9),
    # https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703, HGX B200: NVLink 1.8 TB/s, PCIe 128 GB/s, both
    # directions. The memory has 7,680 bits at 3,996 MHz, twice a clock, by its driver: github.com/pytorch/ao/pull/4002
    "b200": Sheet("NVIDIA B200", 7.67e12, 900e9, 64e9),
}
"""Devices that `longring plan --device` knows by name."""


@dataclass(frozen=True)
class Device:
    """Rates that a rank reaches on its device: shares of a data sheet's, or measured on this machine's ranks."""

    name: str
    memory_bytes: float
    peak_flops: float
    """FLOP/s that a utilization of 1 stands for: those of the data sheet, or of the measured matrix products."""
    product_flops: float
    """FLOP/s of large matrix products."""
    operator_bytes_per_s: float
    """Bytes of tensors that norms, SwiGLU and their like read and write, counted once each, per second."""
    update_bytes_per_s: float
    """Bytes that AdamW reads and writes, counted by each of its passes, per second."""
    host_bytes_per_s: float
    """Bytes copied to or from the host's memory, in one direction, per second."""
    host_update_bytes_per_s: float
    """Bytes that AdamW reads and writes in the memory of the host, per second."""
    attention: Speed
    link_share: float
    """Share of the bandwidth of links that collectives reach."""
    is_gpu: bool = True
    """Whether communication and copies go on while the device computes; on CPUs they take the same cores."""


def named_device(name: str, attention_backend: str = "auto") -> Device:
    """Return the device of a data sheet, with the assumed shares of its limits.

    Attention has the speed of a record of this device and the backend ("auto": the fastest), else the assumed one of an
    H100 in proportion to the peaks. Raises ValueError for an unknown name.
    """
    if name not in SHEETS:
        raise ValueError(
            f"--device {name}: must be one of {', '.join(SHEETS)}, or a file that `longring topology --json` wrote"
        )
    sheet = SHEETS[name]
    peak, memory = peak_flops(sheet.name), device_bytes(sheet.name)
    h100 = peak_flops(SHEETS["h100"].name)
    assert peak and memory and h100, "the tables know every device that has a short name"
    speed, origin = speed_of(sheet.name, attention_backend)
    if origin == "assumed":
        forward, backward = (flops * peak / h100 for flops in (speed.forward_flops, speed.backward_flops))
        speed = replace(speed, forward_flops=forward, backward_flops=backward)
    return Device(
        sheet.name,
        memory,
        peak,
        PRODUCT_SHARE * peak,
        MEMORY_SHARE * sheet.memory_bytes_per_s,  # of operators
        MEMORY_SHARE * sheet.memory_bytes_per_s,  # of AdamW
        LINK_SHARE * sheet.host_bytes_per_s,
        HOST_MEMORY_BYTES_PER_S,
        speed,
        LINK_SHARE,
    )


def measured_device(file: Path) -> tuple[Device, Topology]:
    """Return the device and the links between ranks that `longring topology --json` has measured.

    Raises ValueError if the file is not one of these, and OSError if it cannot be read.
    """
    try:
        found = json.loads(file.read_text())
        speed = Speed(**found["device"]["attention"])
        device = Device(**{**found["device"], "attention": speed})
        fabrics = {side: found["topology"][side] for side in ("inside", "across", "copies")}  # null: no fabric
        topology = Topology(
            **{**found["topology"], **{side: fabric and Fabric(**fabric) for side, fabric in fabrics.items()}}
        )
        rates = [getattr(device, field.name) for field in fields(Device) if field.type == "float"]
        rates += [fabric["bytes_per_s"] for fabric in fabrics.values() if fabric]
        if not all(0 < rate < math.inf for rate in (*rates, speed.forward_flops, speed.backward_flops)):
            raise ValueError("a rate is not a positive number")
        return device, topology
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"--device {file}: has no measured device; write it with `longring topology RECIPE --json {file}`"
        ) from error


def device_json(device: Device) -> dict[str, object]:
    """Return a device as `measured_device` reads it."""
    return asdict(device)
