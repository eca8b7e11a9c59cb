"""Measures of the steps of a run on one rank: time by part, FLOPs, memory, and bits per byte."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..data.format.manifest import Manifest
from ..data.read.loader import MicroBatch
from ..parallel.mesh import Mesh
from .build import BucketLayout
from .config import Recipe
from .flops import ModelFlops, document_lengths, peak_flops
from .parts import Parts

log = logging.getLogger(__name__)


class Utilization(NamedTuple):
    """Rate of a step on each device."""

    tflops: float
    """TFLOP/s, by visible pairs of the true documents and windows."""
    mfu: float
    """The same as a share of the device's peak; NaN where the peak is not known."""
    mfu_dense: float
    """Share of the peak if every token saw its whole sequence, as torchtitan and OLMo-core count it."""


class Meter:
    """Measures of one rank, whose numbers are summed over the ranks once a step."""

    def __init__(self, recipe: Recipe, manifest: Manifest, mesh: Mesh) -> None:
        self.parts = Parts(mesh.device)
        self._flops = ModelFlops.of(recipe.model, max(recipe.model.vocab_size, manifest.vocab_size))
        self._world_size = mesh.world_size
        on_gpu = mesh.device.type == "cuda" and recipe.train.dtype == "bfloat16"
        self._peak = peak_flops(torch.cuda.get_device_name(mesh.device)) if on_gpu else None
        self._bytes_per_token = bytes_per_token(manifest) if mesh.rank == 0 else math.nan
        self._attention_flops = 0.0

    def add(self, micro_batch: MicroBatch, layout: BucketLayout) -> None:
        """Count the attention of this rank's share of a micro-batch."""
        starts = micro_batch.document_starts if layout.document_masks else None
        rows = starts or [(0,)] * len(micro_batch.rows)  # [sequence][document]
        documents = [length for row in rows for length in document_lengths(row, micro_batch.length)]
        # All ranks of a ring read whole sequences: each counts an equal part of them.
        self._attention_flops += self._flops.attention(documents) / layout.context_parallel

    def take_attention_flops(self) -> float:
        """Return the FLOPs counted since the last call."""
        taken, self._attention_flops = self._attention_flops, 0.0
        return taken

    def utilization(self, attention_flops: float, tokens: Mapping[int, int], seconds: float) -> Utilization:
        """Return the rate of a step from the sum of all ranks' attention, and its tokens by sequence length."""
        if not tokens:  # left out: nothing was computed
            return Utilization(math.nan, math.nan, math.nan)
        matrices = self._flops.matrices(sum(tokens.values()))
        dense = sum(self._flops.dense_attention(number, length) for length, number in tokens.items())
        # FLOP/s of a device: by visible pairs, dense.
        rates = [(matrices + attention) / seconds / self._world_size for attention in (attention_flops, dense)]
        peak = self._peak or math.nan
        return Utilization(rates[0] / 1e12, checked_share(rates[0], peak), rates[1] / peak)

    def bits_per_byte(self, loss: float) -> float:
        """Return a loss in nats per token as bits per byte of text; NaN if the tokens' bytes are not known."""
        return loss / math.log(2) / self._bytes_per_token


def checked_share(rate: float, peak: float) -> float:
    """Return `rate / peak`; NaN, and an error in the log, if it is above 1: no device exceeds its peak."""
    if rate > peak:
        log.error(
            "%.3g FLOP/s is above the device's peak of %.3g: an error of LongRing's count; not recorded", rate, peak
        )
        return math.nan
    return rate / peak


def bytes_per_token(manifest: Manifest) -> float:
    """Return the mean number of bytes of a training target; NaN unless the tokenizer is a byte-level one.

    Each character of a byte-level token stands for one byte; special tokens have none.
    """
    content = json.loads(manifest.tokenizer_json())
    decoder = content.get("decoder") or {}
    if "ByteLevel" not in [part.get("type") for part in (decoder, *decoder.get("decoders", ()))]:
        return math.nan
    tokenizer, counts = manifest.tokenizer().tokenizer, manifest.unigram()
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    num_bytes = sum(int(counts[n]) * len(token) for token, n in vocabulary.items() if n not in special)
    return num_bytes / max(int(counts.sum()), 1) or math.nan
