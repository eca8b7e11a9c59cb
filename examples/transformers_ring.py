"""Train a Llama of transformers over a ring of 4 ranks, and beside it on one process: the losses are equal.

torchrun --nproc-per-node 4 examples/transformers_ring.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from longring import ContextParallel, CpGrid
from longring.adapters.hugging_face import model_inputs, register
from transformers import LlamaConfig, LlamaForCausalLM

NUM_TOKENS, VOCABULARY, STEPS = 250, 128, 5


def llama(attention: str) -> LlamaForCausalLM:
    """Return a small Llama with random weights, equal on all ranks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    return model


def main() -> str:
    """Train both models and return their losses as a table. Collective."""
    register()
    parallel = ContextParallel(None, CpGrid.token_ring(dist.get_world_size()))
    sequence = parallel.sequence(NUM_TOKENS)
    alone, shared = llama("sdpa"), llama("longring")
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (alone, shared)]
    lines = [f"a rank holds {sequence.layout.num_tokens} of {NUM_TOKENS} tokens", "step  one process  ring of 4"]
    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        # The second half repeats the first: a model that looks back far enough can learn it.
        tokens = torch.randint(VOCABULARY, (2, NUM_TOKENS // 2), generator=generator).repeat(1, 2)  # [2, NUM_TOKENS]

        loss_alone = alone(input_ids=tokens, labels=tokens).loss
        loss_alone.backward()

        loss = shared(**model_inputs(sequence, tokens, tokens)).loss  # this rank's part of the mean
        loss.backward()
        dist.all_reduce(loss.detach())
        for parameter in shared.parameters():
            dist.all_reduce(parameter.grad)

        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        lines.append(f"{step:4}  {loss_alone.item():11.4f}  {loss.item():9.4f}")
        assert abs(loss_alone.item() - loss.item()) < 1e-4, "the losses differ"
    return "\n".join(lines)


if __name__ == "__main__":
    dist.init_process_group()
    text = main()
    if dist.get_rank() == 0:
        print(text)
    dist.destroy_process_group()
