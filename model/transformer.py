"""The decoder: tokens and targets in, the loss of every token out."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.layout import SeqLayout
from .attention import AttentionFunction, SelfAttention
from .config import ModelConfig
from .loss import LossHead
from .mlp import SwiGLU
from .norm import RMSNorm
from .rope import rope_table


class TransformerLayer(nn.Module):
    """Pre-norm residual block.

    With `recompute` the backward computes again all but attention, whose messages between ranks are then not sent
    twice: of a block remain its input, q, k, v, and attention's result with its lse.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, window: int | None, recompute: bool) -> None:
        super().__init__()
        self.window, self.recompute = window, recompute
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.attention = SelfAttention(config, parallel)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.mlp = SwiGLU(config, parallel)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: AttentionFunction) -> Tensor:
        """x `[s, b, hidden]` -> the same shape."""
        if not self.recompute:
            return self._after(x, attention(*self._before(x, rope), self.window))
        q, k, v = checkpoint(self._before, x, rope, use_reentrant=False)
        return checkpoint(self._after, x, attention(q, k, v, self.window), use_reentrant=False)

    def _before(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self.attention_norm(x), rope)

    def _after(self, x: Tensor, out: Tensor) -> Tensor:
        x = x + self.attention.project_back(out)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A causal language model of one replica, its weights divided over the tensor-parallel group.

    Weights are made on the CPU, whole, and then cut, so the same seed gives the same model at every degree of tensor
    parallelism. Initialise megatron-core's parallel state before.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, parallel: ModelParallelConfig, recompute: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.sequence_parallel = parallel.sequence_parallel
        vocab_rows = config.padded_vocab_size(vocab_size)
        self.embedding = VocabParallelEmbedding(
            vocab_rows,
            config.hidden_size,
            init_method=partial(torch.nn.init.normal_, std=config.init_std),
            reduce_scatter_embeddings=parallel.sequence_parallel,
            config=parallel,
        )
        self.blocks = nn.ModuleList(
            TransformerLayer(config, parallel, config.attention_window(layer), recompute)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.head = LossHead(config, vocab_rows, parallel)

    def forward(self, tokens: Tensor, targets: Tensor, layout: SeqLayout, attention: AttentionFunction) -> Tensor:
        """Loss of every token, nats, fp32 `[b, s]`.

        tokens, targets int64 `[b, s]`; `layout` gives the positions of s in the context, and `attention` must be one
        of the same layout, which knows who holds the rest of it.
        """
        x = self.embedding(tokens)
        if not self.sequence_parallel:
            x = x.transpose(0, 1).contiguous()  # with it, the embedding gives [s / tp, b, hidden] already
        rope = rope_table(layout.rotary_positions(tokens.device), self.config.head_dim, self.config.rope_base)
        for block in self.blocks:
            x = block(x, rope, attention)
        return self.head(self.norm(x), targets)
