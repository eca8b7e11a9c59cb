"""Activations that wait for the backward in the memory of the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostCopies:
    """Tensors that the layers of one forward keep for the backward, held on the host in between.

    On a GPU the copies run on a stream of their own: to page-locked memory while the next layer computes its forward,
    and back while the layer after it computes its backward. On a CPU each is a copy in other memory.
    """

    def __init__(self) -> None:
        self._layers: list[list[_HostCopy]] = []
        """Copies of each layer that have not begun to come back."""

    @contextmanager
    def of_layer(self, *, is_last: bool) -> Iterator[None]:
        """Keep on the host what the next layer saves in this context; what the last layer saves stays on its device."""
        layer, copies = len(self._layers), list[_HostCopy]()
        # A layer saves some tensors twice, which `known` tells by their addresses. It holds the originals until the
        # layer ends, so that no later tensor gets the same address.
        known: dict[tuple[Any, ...], tuple[Tensor, _HostCopy]] = {}
        self._layers.append(copies)

        def pack(kept: Tensor) -> Tensor | _HostCopy:
            if not kept.is_floating_point():  # the masks, which all layers share
                return kept
            name = (kept.data_ptr(), kept.dtype, kept.shape, kept.stride())  # another view is another tensor
            if name not in known:
                known[name] = kept, _HostCopy(kept, layer, stays=is_last)
                copies.append(known[name][1])
            return known[name][1]

        with saved_tensors_hooks(pack, self._unpack):
            yield
        known.clear()

    def _unpack(self, packed: Tensor | _HostCopy) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        for layer in (packed.layer, packed.layer - 1):  # the layer before is fetched while this one computes
            if layer >= 0:
                copies, self._layers[layer] = self._layers[layer], []  # each is begun once
                for copy in copies:
                    copy.fetch()
        return packed.tensor()


class _HostCopy:
    """One tensor that is on the host until `fetch` brings it back to its device."""

    def __init__(self, kept: Tensor, layer: int, *, stays: bool) -> None:
        self.layer, self._device = layer, kept.device
        self._here: Tensor | None = kept if stays else None
        self._host: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        if not stays:
            on_gpu = kept.is_cuda
            self._host = torch.empty_like(kept, device="cpu", pin_memory=on_gpu)
            with _beside(self._device):
                self._host.copy_(kept, non_blocking=on_gpu)
            if on_gpu:
                kept.record_stream(_stream(self._device))  # not reused before the copy has read it

    def fetch(self) -> None:
        """Begin to bring the tensor back to its device."""
        if self._host is None:
            return
        if self._device.type == "cpu":
            self._here = self._host
        else:
            self._here = torch.empty_like(self._host, device=self._device)
            with _beside(self._device):
                self._here.copy_(self._host, non_blocking=True)
            self._here.record_stream(_stream(self._device))  # nor this memory while the copy writes it
            self._arrived = torch.cuda.Event()
            self._arrived.record(_stream(self._device))
        self._host = None

    def tensor(self) -> Tensor:
        """Return the tensor on its device; the computation waits for it."""
        assert self._here is not None, "its layer was fetched"
        if self._arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)
        return self._here


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Run operations after everything submitted to the computation so far, and beside everything submitted later."""
    if device.type == "cpu":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
