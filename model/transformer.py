"""The decoder, from tokens and targets to the loss of every token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.layout import SeqLayout
from .attention import AttentionFunction, SelfAttention
from .config import MemoryConfig, ModelConfig
from .host_copies import HostCopies
from .loss import LossHead
from .mlp import SwiGLU
from .norm import RMSNorm
from .rope import rope_table
from .weights import values_later


class TransformerLayer(nn.Module):
    """A residual layer: attention, then SwiGLU, with a norm before or after each of them.

    A layer that is recomputed keeps its input, q, k, v, and attention's out and lse: the backward computes everything
    but attention again, so that attention's messages between ranks are sent once per pass.
    """

    def __init__(
        self, config: ModelConfig, parallel: ModelParallelConfig, layer: int, memory: MemoryConfig | None = None
    ) -> None:
        super().__init__()
        memory = memory or MemoryConfig()
        self.window, self.activations = config.attention_window(layer), memory.activations
        self.norm_before = config.norm_order == "before"
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.attention = SelfAttention(config, parallel)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
        self.mlp = SwiGLU(config, parallel, memory.mlp_tile_tokens)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, attention: AttentionFunction) -> Tensor:
        """Return the layer's result for x `[s, b, hidden]`, or this rank's part of s, in the same shape.

        `rope` is the cos and sin of `rope_table`, each `[s, d / 2]`; None if the layer has no RoPE. Collective over the
        tensor-parallel group, and over the ranks that `attention` joins.
        """
        # q, k, v [b, s, heads / tp, d] hold all of s: attention needs the whole of this rank's positions.
        if self.activations in ("keep", "recompute_mlp"):
            x = self._add_attention(x, attention(*self._before_attention(x, rope), self.window))
            return self._add_mlp(x) if self.activations == "keep" else self._again(self._add_mlp, x)
        q, k, v = self._again(self._before_attention, x, rope)
        return self._again(self._after_attention, x, attention(q, k, v, self.window))

    def _again(self, half: Callable[..., Any], *inputs: Any) -> Any:
        """Return the result of half a layer, and let the backward compute its activations again."""
        # Where no norm follows SwiGLU, the backward does not need its result, so that recomputation skips it.
        skipped = self.mlp.skipped() if self.norm_before else nullcontext()
        # Nothing in a layer is random; keeping the random state would wait for the GPU twice a layer.
        return checkpoint(
            half,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), skipped),
        )

    def _before_attention(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v as `SelfAttention.project` does."""
        return self.attention.project(self.attention_norm(x) if self.norm_before else x, rope)

    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the layer's result from its input x and attention's out `[b, s, h_q / tp, d]`."""
        return self._add_mlp(self._add_attention(x, out))

    def _add_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the residual stream after attention, from the layer's input x and attention's out."""
        result = self.attention.project_back(out)
        return x + (result if self.norm_before else self.attention_norm(result))

    def _add_mlp(self, x: Tensor) -> Tensor:
        """Return the residual stream after SwiGLU, from that after attention."""
        return x + (self.mlp(self.mlp_norm(x)) if self.norm_before else self.mlp_norm(self.mlp(x)))


class Transformer(nn.Module):
    """A causal language model whose weights are divided over the tensor-parallel group.

    It is made on the meta device, without any memory; `fill_weights` gives it weights. megatron-core's parallel state
    must be initialized before.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        parallel: ModelParallelConfig,
        memory: MemoryConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.memory = config, memory or MemoryConfig()
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
                TransformerLayer(config, parallel, layer, self.memory) for layer in range(config.num_layers)
            )
            self.norm = RMSNorm(config.hidden_size, config.norm_epsilon, parallel)
            self.head = LossHead(config, vocab_size, parallel, int(self.memory.kept_logits_gb * 1e9))
            if config.tied_head:
                self.head.weight = self.embedding.weight  # one parameter, which has the embedding's name

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        layout: SeqLayout,
        attention: AttentionFunction,
        greedy: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of every token in nats, fp32 `[b, s]`.

        tokens and targets are int64 `[b, s]`. `layout` gives the positions of s in the context; `attention` must be
        made for the same layout. `greedy`, int64 `[b, s]`, is filled with the most likely token of each position, one
        of equally likely ones. Collective over the tensor-parallel group, and over the ranks that `attention` joins.
        """
        x = self.embedding(tokens)
        if not self.sequence_parallel:
            # [b, s, hidden] -> [s, b, hidden]; under sequence parallelism the embedding returns [s / tp, b, hidden].
            x = x.transpose(0, 1).contiguous()
        positions = layout.rotary_positions(tokens.device)
        scalings = [self.config.rope_scaling_of(layer) for layer in range(self.config.num_layers)]
        tables = {  # cos and sin `[s, d / 2]` by scaling; None: no RoPE
            scaling: scaling and rope_table(positions, self.config.head_dim, self.config.rope_base, scaling)
            for scaling in set(scalings)
        }
        host = HostCopies() if self.memory.activations == "offload" else None
        for number, (layer, scaling) in enumerate(zip(self.blocks, scalings, strict=True), 1):
            with host.of_layer(is_last=number == len(self.blocks)) if host else nullcontext():
                x = layer(x, tables[scaling], attention)
        return self.head(self.norm(x), targets, greedy)
