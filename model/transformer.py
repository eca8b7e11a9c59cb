"""The decoder, from tokens and targets to the loss of every token."""

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
from .weights import values_later


class TransformerLayer(nn.Module):
    """A residual layer: attention, then SwiGLU, with a norm before or after each of them.

    With `recompute` the backward computes everything but attention again, so that attention's messages between ranks
    are sent once per pass. The layer then keeps its input, q, k, v, and attention's out and lse.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, layer: int, recompute: bool) -> None:
        super().__init__()
        self.window, self.recompute = config.attention_window(layer), recompute
        self.norm_before = config.norm_order == "before"
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.attention = SelfAttention(config, parallel)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.mlp = SwiGLU(config, parallel)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, attention: AttentionFunction) -> Tensor:
        """Return the layer's result for x `[s, b, hidden]`, or this rank's part of s, in the same shape.

        `rope` is the cos and sin of `rope_table`, each `[s, d / 2]`; None if the layer has no RoPE. Collective over the
        tensor-parallel group, and over the ranks that `attention` joins.
        """
        # q, k, v [b, s, heads / tp, d] hold all of s: attention needs the whole of this rank's positions.
        if not self.recompute:
            return self._after_attention(x, attention(*self._before_attention(x, rope), self.window))
        # Nothing in a layer is random; keeping the random state would wait for the GPU twice a layer.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        q, k, v = again(self._before_attention, x, rope)
        return again(self._after_attention, x, attention(q, k, v, self.window))

    def _before_attention(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v as `SelfAttention.project` does."""
        return self.attention.project(self.attention_norm(x) if self.norm_before else x, rope)

    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the layer's result from its input x and attention's out `[b, s, h_q / tp, d]`."""
        if self.norm_before:
            x = x + self.attention.project_back(out)
            return x + self.mlp(self.mlp_norm(x))
        x = x + self.attention_norm(self.attention.project_back(out))
        return x + self.mlp_norm(self.mlp(x))


class Transformer(nn.Module):
    """A causal language model whose weights are divided over the tensor-parallel group.

    It is made on the meta device, without any memory; `fill_weights` gives it weights. megatron-core's parallel state
    must be initialised before.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, parallel: ModelParallelConfig, recompute: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.sequence_parallel = parallel.sequence_parallel
        vocab_rows = config.padded_vocab_size(vocab_size)
        # Checkpoints name parameters by these attributes ("blocks.0.mlp.down.weight"), and initial values depend on
        # the names: renaming one changes both.
        with torch.device("meta"):
            self.embedding = VocabParallelEmbedding(
                vocab_rows,
                config.hidden_size,
                init_method=values_later,
                reduce_scatter_embeddings=parallel.sequence_parallel,
                config=parallel,
            )
            self.blocks = nn.ModuleList(
                TransformerLayer(config, parallel, layer, recompute) for layer in range(config.num_layers)
            )
            self.norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
            self.head = LossHead(config, vocab_size, parallel)
            if config.tied_head:
                self.head.weight = self.embedding.weight  # one parameter, which has the embedding's name

    def forward(self, tokens: Tensor, targets: Tensor, layout: SeqLayout, attention: AttentionFunction) -> Tensor:
        """Return the loss of every token in nats, fp32 `[b, s]`.

        tokens and targets are int64 `[b, s]`. `layout` gives the positions of s in the context; `attention` must be
        made for the same layout. Collective over the tensor-parallel group, and over the ranks that `attention` joins.
        """
        x = self.embedding(tokens)
        if not self.sequence_parallel:
            # [b, s, hidden] -> [s, b, hidden]; under sequence parallelism the embedding returns [s / tp, b, hidden].
            x = x.transpose(0, 1).contiguous()
        positions = layout.rotary_positions(tokens.device)
        scalings = [self.config.rope_scaling_of(layer) for layer in range(self.config.num_layers)]
        tables = {
            scaling: scaling and rope_table(positions, self.config.head_dim, self.config.rope_base, scaling)
            for scaling in set(scalings)
        }
        for layer, scaling in zip(self.blocks, scalings, strict=True):
            x = layer(x, tables[scaling], attention)
        return self.head(self.norm(x), targets)
