"""The decoder: tokens and targets in, the loss of every token out."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor, nn

from ..kernels.layout import SeqLayout
from .attention import AttentionFunction, SelfAttention
from .config import ModelConfig
from .loss import LossHead
from .mlp import SwiGLU
from .norm import RMSNorm
from .rope import rope_table


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.attention = SelfAttention(config, parallel)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.mlp = SwiGLU(config, parallel)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: AttentionFunction) -> Tensor:
        """x `[s, b, hidden]` -> the same shape."""
        x = x + self.attention(self.attention_norm(x), rope, attention)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A causal language model of one replica, its weights divided over the tensor-parallel group.

    Weights are made on the CPU, whole, and then cut, so the same seed gives the same model at every degree of tensor
    parallelism. Initialise megatron-core's parallel state before.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, parallel: ModelParallelConfig) -> None:
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
        self.blocks = nn.ModuleList(Block(config, parallel) for _ in range(config.num_layers))
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
        rope = rope_table(layout.positions(tokens.device), self.config.head_dim, self.config.rope_base)
        for block in self.blocks:
            x = block(x, rope, attention)
        return self.head(self.norm(x), targets)
