"""The sizes and constants of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-like decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU, untied head, no biases.

    Raises ValueError for sizes that do not divide each other as needed.
    """

    num_layers: Annotated[int, Interval(ge=1, le=10_000)]
    """Number of transformer layers."""
    hidden_size: Annotated[int, Interval(ge=1, le=2**20)]
    """Width of the residual stream."""
    num_heads: Annotated[int, Interval(ge=1, le=2**16)]
    """Number of query heads, each of hidden_size / num_heads dims."""
    num_kv_heads: Annotated[int, Interval(ge=1, le=2**16)]
    """Number of key-value heads; must divide num_heads (equal: multi-head attention, 1: multi-query attention)."""
    ffn_hidden_size: Annotated[int, Interval(ge=1, le=2**22)]
    """Width of the two inner projections of SwiGLU."""
    rope_base: Annotated[float, Interval(ge=1, le=1e12)] = 100_000.0
    """Base of the RoPE frequencies; increase it with the context (1e5 for 8k tokens, 5e6 for 128k)."""
    window_tokens: Annotated[int, Interval(ge=0, le=2**30)] = 0
    """Attention window of the windowed layers in tokens, the query included; 0: every layer sees the whole context."""
    full_attention_every: Annotated[int, Interval(ge=1, le=10_000)] = 1
    """Period of the layers that see the whole context: with 6, layers 6, 12, ... do, and the others are windowed."""
    norm_epsilon: Annotated[float, Interval(gt=0, le=1)] = 1e-5
    """Constant added to the mean square in RMSNorm."""
    init_std: Annotated[float, Interval(gt=0, le=10)] = 0.02
    """Standard deviation of initial weights, divided by sqrt(2 num_layers) for projections into the residual stream."""

    def __post_init__(self) -> None:
        # RoPE rotates pairs of dims, so the head dim must be even.
        if self.hidden_size % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"model.hidden_size = {self.hidden_size} over model.num_heads = {self.num_heads}: "
                "the quotient, the head dim, must be an even integer"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads = {self.num_kv_heads}: must divide model.num_heads = {self.num_heads}"
            )
        # A window without windowed layers, or windowed layers without a window, is a mistake in the recipe.
        if (self.window_tokens > 0) != (self.full_attention_every > 1):
            raise ValueError(
                f"model.window_tokens = {self.window_tokens} with model.full_attention_every = "
                f"{self.full_attention_every}: windowed layers need both, the first above 0 and the second above 1; "
                "without windowed layers set 0 and 1"
            )

    def attention_window(self, layer: int) -> int | None:
        """Return the attention window of a layer (counted from 0) in tokens, or None for the whole context."""
        return None if (layer + 1) % self.full_attention_every == 0 else self.window_tokens

    @property
    def head_dim(self) -> int:
        """The number of dims of one head."""
        return self.hidden_size // self.num_heads

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Return the rows of embedding and head: vocab_size rounded up to a multiple of 128, for tensor parallelism."""
        return -(-vocab_size // 128) * 128
