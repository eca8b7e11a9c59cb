"""LongRing's attention as the core attention of megatron-core's layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from ..parallel.cp.shared import ContextParallel, SharedSequence


def over_ranks(layer: ModuleSpec, parallel: ContextParallel) -> ModuleSpec:
    """Return the spec of a transformer layer with LongRing's attention over the ranks of `parallel`.

    `layer` is one of megatron-core's, such as that of `get_gpt_layer_local_spec`; it stays as it is.
    """

    @lru_cache(maxsize=16)  # all layers of one attention window use one sequence
    def sequence_of(num_tokens: int, window: int | None) -> SharedSequence:
        return parallel.sequence(num_tokens, windows=[window])

    core = ModuleSpec(module=ContextParallelAttention, params={"parallel": parallel, "sequence_of": sequence_of})
    submodules: Any = layer.submodules
    attention = submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core))
    return replace(layer, submodules=replace(submodules, self_attention=attention))


class ContextParallelAttention(MegatronModule):
    """Causal attention over the ranks of megatron-core's context-parallel group, in megatron-core's own zigzag.

    Attention windows are those of the config. Raises ValueError if `parallel` is not of that group, or if the config
    asks for attention that ranks cannot share.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        parallel: ContextParallel,
        sequence_of: Callable[[int, int | None], SharedSequence],
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        wanted, ranks = (dist.get_process_group_ranks(group) for group in (groups.cp, parallel.process_group))
        if wanted != ranks:
            raise ValueError(
                f"parallel: is of the ranks {ranks}, and the context-parallel group of the model has {wanted}; make it "
                "as ContextParallel(parallel_state.get_context_parallel_group(), grid)"
            )
        for name, value, only in (
            ("attention_dropout", config.attention_dropout, 0.0),
            ("softmax_type", config.softmax_type, "vanilla"),
            ("attn_mask_type", attn_mask_type, AttnMaskType.causal),
        ):
            if value != only:
                raise ValueError(f"{name} = {value}: attention over ranks has only {only}; set it to {only}")
        self.size, self.sequence_of, self.softmax_scale = parallel.size, sequence_of, softmax_scale
        windowed = is_layer_window_attention(
            config.window_size,
            config.window_attn_skip_freq,  # type: ignore[arg-type] (None is one of its cases)
            layer_number,
        )
        # megatron-core counts the positions before the query (-1: all of them), LongRing the query as well.
        before = config.window_size[0] if windowed and config.window_size else -1
        self.window = before + 1 if before >= 0 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Return attention `[s, b, h_q d]` of query `[s, b, h_q, d]` over key and value `[s, b, h_kv, d]`. Collective.

        Raises ValueError for a mask, another order than the causal one, a bias or packed sequences, which would be
        ignored.
        """
        if attn_mask_type not in (None, AttnMaskType.causal):
            raise ValueError(f"attn_mask_type = {attn_mask_type}: attention over ranks is causal; give None")
        for name, extra in (
            ("attention_mask", attention_mask),
            ("attention_bias", attention_bias),
            ("packed_seq_params", packed_seq_params),
        ):
            if extra is not None:
                raise ValueError(f"{name}: attention over ranks is causal over whole sequences; give None")
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [b, s, h, d]
        # megatron-core gives equally many tokens to all ranks.
        sequence = self.sequence_of(q.shape[1] * self.size, self.window)
        out = sequence.attention(q, k, v, window=self.window, scale=self.softmax_scale)
        return out.flatten(2).transpose(0, 1).contiguous()  # [b, s, h_q, d] -> [s, b, h_q d]
