"""What the model is: sizes and constants."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder like Llama's: RMSNorm, RoPE, grouped-query attention, SwiGLU, untied head, no biases."""

    num_layers: int
    """Blocks of attention and feed-forward."""
    hidden_size: int
    """Width of the residual stream."""
    num_heads: int
    """Query heads; each has hidden_size / num_heads dims."""
    num_kv_heads: int
    """Key and value heads; num_heads is a multiple of it (equal: MHA, 1: MQA)."""
    ffn_hidden_size: int
    """Width of the SwiGLU's two inner projections."""
    rope_base: float = 100_000.0
    """Base of the rotary frequencies; grow it with the context (100k for 8k tokens, 5e6 for 128k)."""
    window_tokens: int = 0
    """Tokens that a window layer's queries see, themselves included; 0: every layer sees the whole context."""
    full_attention_every: int = 1
    """Every so many layers one sees the whole context; of 6, layers 6, 12, ... do and the others have the window."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream get it / sqrt(2 num_layers)."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: must be at least 1")
        if self.hidden_size % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"model.hidden_size = {self.hidden_size} over model.num_heads = {self.num_heads}: "
                "the quotient is the head dim and must be an even integer (RoPE turns pairs)"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_heads = {self.num_kv_heads}"
            )

        if self.window_tokens < 0 or self.full_attention_every < 1:
            raise ValueError(
                f"model.window_tokens = {self.window_tokens} must not be negative, and model.full_attention_every = "
                f"{self.full_attention_every} must be at least 1"
            )
        if (self.window_tokens > 0) != (self.full_attention_every > 1):
            raise ValueError(
                f"model.window_tokens = {self.window_tokens} with model.full_attention_every = "
                f"{self.full_attention_every}: a window takes both, the first above 0 and the second above 1"
            )

    def attention_window(self, layer: int) -> int | None:
        """Tokens that the queries of a layer (from 0) see; None: all before them."""
        return None if (layer + 1) % self.full_attention_every == 0 else self.window_tokens

    @property
    def head_dim(self) -> int:
        """Dims of one head."""
        return self.hidden_size // self.num_heads

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding and the head: a multiple of 128, so that any sensible tensor parallelism divides it."""
        return -(-vocab_size // 128) * 128
