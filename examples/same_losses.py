"""Train one Llama twice from the same weights: by LongRing's loop, and by a loop over transformers' model.

    torchrun --nproc-per-node 4 examples/same_losses.py

Both read the same prepared data. LongRing gives every rank 256 tokens, so a sequence has a ring of 1, 2 or 4 ranks; the
other loop shares every sequence among all ranks. The losses of all steps are equal.
"""

from __future__ import annotations

import argparse as source_of_documents
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from longring import ContextParallel, CpGrid, StatefulLoader
from longring.adapters.hugging_face import model_inputs, register
from longring.data.prepare.prepare import prepare
from longring.launch.config import Recipe, load_recipe
from longring.launch.learning_rate import learning_rate
from longring.launch.train import train
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

RECIPE = """
run_directory = "{directory}/run"
init.from = "{directory}/llama"
[data]
directory = "{directory}/data"
min_bucket_tokens = 128
max_bucket_tokens = 1024
source = {{ kind = "json", path = "{directory}/documents.jsonl" }}
tokenizer = {{ vocab_size = 500 }}
[model]
num_layers = 2
hidden_size = 64
num_heads = 4
num_kv_heads = 2
ffn_hidden_size = 128
vocab_size = 512
[parallel]
tokens_per_rank = 256
cp.schedule = "token_ring"
[train]
steps = 8
global_batch_tokens = 2048
learning_rate = 3e-3
min_learning_rate = 1e-3
clip_grad_norm = 0.5
dtype = "float32"
"""


def make_all(directory: Path) -> None:
    """Write a recipe, prepared data and the weights of a Llama to a directory."""
    file = directory / "recipe.toml"
    file.write_text(RECIPE.format(directory=directory))
    text = Path(source_of_documents.__file__).read_text()
    documents = [text[start : start + 4000] for start in range(0, 80_000, 1000)]
    (directory / "documents.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in documents))
    recipe = load_recipe(file)
    prepare(recipe.data, Console(quiet=True))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=recipe.model.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=recipe.model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.model.rope_base},
    )
    LlamaForCausalLM(config).save_pretrained(directory / "llama")
    shutil.copy(directory / "data" / "tokenizer.json", directory / "llama")


def transformers_losses(recipe: Recipe) -> Iterator[float]:
    """Train the Llama with LongRing's attention over all ranks and yield the loss of every step. Collective."""
    register()
    parallel = ContextParallel(None, CpGrid.token_ring(dist.get_world_size()))
    sequences = {length: parallel.sequence(length) for length in recipe.lengths}
    model = LlamaForCausalLM.from_pretrained(recipe.init.from_, attn_implementation="longring")
    settings, parameters = recipe.train, list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2))
    batch_tokens = settings.global_batch_tokens
    # One replica, the ring of all ranks, takes the whole batch of a step at once.
    loader = StatefulLoader(
        recipe.data.directory,
        steps=settings.steps,
        global_batch_tokens=batch_tokens,
        tokens_per_rank=batch_tokens,
        seed=settings.seed,
        curriculum=recipe.curriculum,
    )
    for batch in loader:
        loss = model(**model_inputs(sequences[batch.bucket], batch.tokens, shift_labels=batch.labels)).loss
        loss.backward()
        dist.all_reduce(loss.detach())
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(batch.step, settings)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def main() -> str:
    """Train twice and return the losses as a table. Collective."""
    with tempfile.TemporaryDirectory() as made:
        paths = [made]  # the ranks use the directory of rank 0
        dist.broadcast_object_list(paths)
        directory = Path(paths[0])
        if dist.get_rank() == 0:
            make_all(directory)
        dist.barrier()
        recipe = load_recipe(directory / "recipe.toml")
        train(recipe, Console(quiet=True))
        records = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = list(transformers_losses(recipe))
        dist.barrier()
    lines = ["step  bucket  ring  longring train  transformers"]
    for own, loss in zip(records, losses, strict=True):
        lines.append(f"{own['step']:4}  {own['bucket']:6}  {own['cp']:4}  {own['loss']:14.4f}  {loss:12.4f}")
        assert abs(own["loss"] - loss) < 1e-4, "the losses differ"
    return "\n".join(lines)


if __name__ == "__main__":
    dist.init_process_group()
    text = main()
    if dist.get_rank() == 0:
        print(text)
    dist.destroy_process_group()
