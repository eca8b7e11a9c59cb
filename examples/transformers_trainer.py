"""Train a Llama over a ring of 4 ranks by transformers' own Trainer, and beside it on one process by a bare loop.

torchrun --nproc-per-node 4 examples/transformers_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from longring import ContextParallel, CpGrid, SharedSequence
from longring.adapters.hugging_face import model_inputs, register
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

NUM_TOKENS, VOCABULARY, STEPS, BATCH, LEARNING_RATE = 250, 128, 5, 2, 3e-3


class RingTrainer(Trainer):
    """A Trainer whose ranks share every sequence of every batch."""

    def __init__(self, sequence: SharedSequence, **settings: Any) -> None:
        super().__init__(**settings)
        self.sequence = sequence
        self.model_accepts_loss_kwargs = False  # model_inputs counts the labels of the batch

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches, of which every rank reads all."""
        return DataLoader(self.train_dataset, batch_size=BATCH)  # type: ignore[arg-type]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return this rank's part of the mean over the batch, times the ranks, over which DDP averages gradients."""
        tokens = inputs["tokens"]
        loss = model(**model_inputs(self.sequence, tokens, tokens)).loss * dist.get_world_size()
        return (loss, {}) if return_outputs else loss


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


def losses_of_the_trainer(rows: list[Tensor]) -> list[float]:
    """Return the loss of every step over a ring of all ranks. Collective."""
    register()
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            output_dir=directory,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,  # leave it out on GPUs
        )  # it starts the process group that torchrun's variables describe
        sequence = ContextParallel(None, CpGrid.token_ring(dist.get_world_size())).sequence(NUM_TOKENS)
        data: Any = [{"tokens": row} for row in rows]
        trainer = RingTrainer(sequence, model=llama("longring"), args=settings, train_dataset=data)
        trainer.train()
    return [float(record["loss"]) for record in trainer.state.log_history if "loss" in record]


def main() -> str:
    """Train both models and return their losses as a table. Collective."""
    generator = torch.Generator().manual_seed(0)
    # The second half repeats the first: a model that looks back far enough can learn it.
    halves = torch.randint(VOCABULARY, (STEPS, BATCH, NUM_TOKENS // 2), generator=generator)
    batches = halves.repeat(1, 1, 2)  # [step, sequence, token]
    ring = losses_of_the_trainer(list(batches.flatten(0, 1)))
    alone = llama("sdpa")
    optimizer = torch.optim.AdamW(alone.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    lines = ["step  one process  Trainer, ring of 4"]
    for step, tokens in enumerate(batches):
        loss = alone(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lines.append(f"{step + 1:4}  {loss.item():11.4f}  {ring[step]:18.4f}")
        assert abs(loss.item() - ring[step]) < 1e-3, "the losses differ"
    return "\n".join(lines)


if __name__ == "__main__":
    text = main()
    if dist.get_rank() == 0:
        print(text)
    dist.destroy_process_group()
