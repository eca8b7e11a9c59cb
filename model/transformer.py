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
    """A pre-norm residual layer: attention, then SwiGLU.

    With `recompute` the backward computes everything but attention again, so that attention's messages between ranks
    are sent once per pass. The layer then keeps its input, q, k, v, and attention's out and lse.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, window: int | None, recompute: bool) -> None:
        super().__init__()
        self.window, self.recompute = window, recompute
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.attention = SelfAttention(config, parallel)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.mlp = SwiGLU(config, parallel)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: AttentionFunction) -> Tensor:
        """Return the layer's result for x `[s, b, hidden]`, or this rank's part of s, in the same shape.

        `rope` is the cos and sin of `rope_table`, each `[s, d / 2]`. Collective over the tensor-parallel group, and
        over the ranks that `attention` joins.
        """
        # q, k, v [b, s, heads / tp, d] hold all of s: attention needs the whole of this rank's positions.
        if not self.recompute:
            return self._after_attention(x, attention(*self._before_attention(x, rope), self.window))
        # Nothing in a layer is random; keeping the random state would wait for the GPU twice a layer.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        q, k, v = again(self._before_attention, x, rope)
        return again(self._after_attention, x, attention(q, k, v, self.window))

    def _before_attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v as `SelfAttention.project` does."""
        return self.attention.project(self.attention_norm(x), rope)

    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the layer's result from its input x and attention's out `[b, s, h_q / tp, d]`."""
        x = x + self.attention.project_back(out)
        return x + self.mlp(self.mlp_norm(x))


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
                TransformerLayer(config, parallel, config.attention_window(layer), recompute)
                for layer in range(config.num_layers)
            )
            self.norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
            self.head = LossHead(config, vocab_rows, parallel)

    def forward(self, tokens: Tensor, targets: Tensor, layout: SeqLayout, attention: AttentionFunction) -> Tensor:
        """Return the loss of every token in nats, fp32 `[b, s]`.

        tokens and targets are int64 `[b, s]`. `layout` gives the positions of s in the context; `attention` must be
        made for the same layout. Collective over the tensor-parallel group, and over the ranks that `attention` joins.
        """
        x = self.embedding(tokens)
        if not self.sequence_parallel:
            # [b, s, hidden] -> [s, b, hidden]; under sequence parallelism the embedding returns [s / tp, b, hidden].
            x = x.transpose(0, 1).contiguous()
        rope = rope_table(layout.rotary_positions(tokens.device), self.config.head_dim, self.config.rope_base)
        for layer in self.blocks:
            x = layer(x, rope, attention)
        return self.head(self.norm(x), targets)
