"""Model FLOPs of a step, counted from the true documents and windows, and as others count them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..model.config import ModelConfig

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
"""Dense bf16 FLOP/s of NVIDIA's data sheets, half of those with sparsity, by a pattern of the device's whole name."""


def peak_flops(name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device's data sheet; None: they are not known here."""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of training, forward and backward, without what is computed twice to save memory.

    A matrix of the layers or the head takes 6 FLOPs a parameter and token: 2 forward, 4 backward. A visible pair of
    query and key takes 12 for each dim of the queries, in each layer: two products forward, four backward.
    """

    parameters: int
    """Parameters of all matrix products of a token: layers and head, without the embedding."""
    attention_width: int
    """Number of query heads times the head dim."""
    windows: Mapping[int | None, int]
    """Number of layers by attention window in tokens; None is full attention."""

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> ModelFlops:
        """Return the FLOPs of a model with this many rows of the head."""
        width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        layer = model.hidden_size * (2 * width + 2 * kv_width + 3 * model.ffn_hidden_size)  # q, out; k, v; SwiGLU
        return cls(
            parameters=model.num_layers * layer + model.hidden_size * vocab_size,
            attention_width=width,
            windows=Counter(model.attention_window(layer) for layer in range(model.num_layers)),
        )

    def matrices(self, tokens: int) -> float:
        """Return the FLOPs of the matrix products of `tokens` tokens."""
        return 6.0 * self.parameters * tokens

    def attention(self, documents: Sequence[int]) -> float:
        """Return the FLOPs of attention over documents of these lengths, each of which sees itself alone."""
        length = np.asarray(documents, dtype=np.float64)  # [documents]
        pairs = sum(layers * visible_pairs(length, window).sum() for window, layers in self.windows.items())
        return float(12.0 * self.attention_width * pairs)

    def dense_attention(self, tokens: int, length: int) -> float:
        """Return the FLOPs of attention as torchtitan counts them: every token sees its whole sequence."""
        return 12.0 * self.attention_width * sum(self.windows.values()) * tokens * length


def visible_pairs(length: np.ndarray | np.float64, window: int | None) -> np.ndarray | np.float64:
    """Return the number of pairs of a query and a key that it sees, in causal documents of these lengths."""
    seen = length if window is None else np.minimum(length, window)
    # The first `seen` queries see 1, 2, ..., seen keys, and all later ones the whole window.
    return seen * (seen + 1) / 2 + (length - seen) * seen


def document_lengths(starts: Sequence[int], length: int) -> list[int]:
    """Return the lengths of the documents of a sequence from the positions at which they begin."""
    return np.diff([*starts, length]).tolist()
