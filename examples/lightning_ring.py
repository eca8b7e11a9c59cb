"""Train a Llama over a ring of 4 ranks by PyTorch Lightning's Trainer, beside it on one process.

torchrun --nproc-per-node 4 examples/lightning_ring.py
"""

from __future__ import annotations

import lightning
import torch
import torch.distributed as dist
from longring import ContextParallel, CpGrid
from longring.adapters.hugging_face import model_inputs, register
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

NUM_TOKENS, VOCABULARY, STEPS, BATCH, LEARNING_RATE = 250, 128, 5, 2, 0.3


class RingLlama(lightning.LightningModule):
    """A Llama whose ranks share every sequence of every batch."""

    def __init__(self) -> None:
        super().__init__()
        register()
        self.model = llama("longring")
        self.losses: list[float] = []

    def on_fit_start(self) -> None:
        """Make the ring: the Trainer has started the process group. Collective."""
        self.sequence = ContextParallel(None, CpGrid.token_ring(dist.get_world_size())).sequence(NUM_TOKENS)

    def training_step(self, tokens: Tensor) -> Tensor:
        """Return this rank's part of the mean over the batch, times the ranks, over which DDP averages gradients."""
        part = self.model(**model_inputs(self.sequence, tokens, tokens)).loss
        whole = part.detach().clone()
        dist.all_reduce(whole)
        self.losses.append(whole.item())
        return part * dist.get_world_size()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; unlike AdamW, SGD tells gradients of another scale."""
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


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
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(VOCABULARY, (STEPS, BATCH, NUM_TOKENS // 2), generator=generator)
    batches = halves.repeat(1, 1, 2)  # [step, sequence, token]
    ring = RingLlama()
    trainer = lightning.Trainer(
        accelerator="cpu",  # "gpu" on GPUs
        devices=4,
        strategy="ddp",
        max_steps=STEPS,
        use_distributed_sampler=False,  # every rank reads every batch
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ring, DataLoader(list(batches.flatten(0, 1)), batch_size=BATCH))  # type: ignore[arg-type]
    alone = llama("sdpa")
    optimizer = torch.optim.SGD(alone.parameters(), lr=LEARNING_RATE)
    lines = ["step  one process  Lightning, ring of 4"]
    for step, tokens in enumerate(batches):
        loss = alone(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lines.append(f"{step + 1:4}  {loss.item():11.4f}  {ring.losses[step]:20.4f}")
        assert abs(loss.item() - ring.losses[step]) < 1e-3, "the losses differ"
    return "\n".join(lines)


if __name__ == "__main__":
    text = main()
    if dist.get_rank() == 0:
        print(text)
    dist.destroy_process_group()
