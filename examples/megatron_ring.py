"""Compute loss and gradients of megatron-core's GPTModel over a ring of 4 ranks, and with its own attention on one.

torchrun --nproc-per-node 4 examples/megatron_ring.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from longring import ContextParallel, CpGrid
from longring.adapters.megatron_core import over_ranks
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

NUM_TOKENS, VOCABULARY, WINDOW = 96, 128, 20


def without_a_gpu() -> None:
    """Replace what megatron-core does on CUDA devices alone; nothing of it is needed on a GPU."""

    def rope_on_this_rank(table: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        chunks = table.chunk(2 * group.size(), dim)
        return torch.cat([chunks[group.rank()], chunks[-1 - group.rank()]], dim)

    torch.cuda.current_device = lambda: torch.device("cpu")
    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = rope_on_this_rank
    initialize_rng_tracker(inference_rng_tracker=True)  # no dropout, no random state of a device


def gpt(context_parallel: int, window: int | None = None) -> tuple[GPTModel, ContextParallel | None]:
    """Return a small model with random weights, equal on all ranks, and its ring if it has one. Collective."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=context_parallel, create_gloo_process_groups=False)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),  # megatron-core counts the positions before the query
        context_parallel_size=context_parallel,
        use_cpu_initialization=True,
    )
    layer, parallel = get_gpt_layer_local_spec(normalization="RMSNorm"), None
    if context_parallel > 1:
        group: Any = parallel_state.get_context_parallel_group()
        parallel = ContextParallel(group, CpGrid.token_ring(context_parallel))
        layer = over_ranks(layer, parallel)
    torch.manual_seed(0)
    return GPTModel(config, layer, VOCABULARY, NUM_TOKENS, position_embedding_type="rope"), parallel


def main() -> str:
    """Return losses and gradient norms with full attention and with windows as a table. Collective."""
    without_a_gpu()
    rows = torch.randint(VOCABULARY, (2, NUM_TOKENS + 1), generator=torch.Generator().manual_seed(0))
    tokens, labels, positions = rows[:, :-1], rows[:, 1:], torch.arange(NUM_TOKENS).expand(2, -1)
    lines = ["window  one process      ring of 4"]
    for window in (None, WINDOW):
        # megatron-core's own attention needs the mask spelled out on a CPU: True is hidden.
        distance = positions[0, :, None] - positions[0]
        hidden = (distance < 0) | (distance >= (window or NUM_TOKENS))
        alone, _ = gpt(1)
        loss_alone = alone(tokens, positions, hidden[None, None], labels=labels).mean()
        loss_alone.backward()

        shared, parallel = gpt(dist.get_world_size(), window)
        assert parallel
        sequence = parallel.sequence(NUM_TOKENS)
        own_tokens, own_positions, own_labels = map(sequence.shard, (tokens, positions, labels))
        loss = shared(own_tokens, own_positions, None, labels=own_labels).sum() / labels.numel()
        loss.backward()
        dist.all_reduce(loss.detach())

        norms = []
        for own, whole in zip(shared.parameters(), alone.parameters(), strict=True):
            assert own.grad is not None and whole.grad is not None
            dist.all_reduce(own.grad)
            torch.testing.assert_close(own.grad, whole.grad, atol=1e-5, rtol=1e-3)
            norms.append((whole.grad.norm(), own.grad.norm()))
        norm_alone, norm = torch.tensor(norms).norm(dim=0).tolist()
        lines.append(f"{window!s:6}  {loss_alone.item():.4f} {norm_alone:6.4f}    {loss.item():.4f} {norm:6.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    dist.init_process_group()
    text = main()
    if dist.get_rank() == 0:
        print(text)
    dist.destroy_process_group()
