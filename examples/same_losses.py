"""Train one Llama twice from the same weights: by `longring train`, and by a loop over transformers' model.

    torchrun --nproc-per-node 4 examples/same_losses.py

Both read the same prepared data. LongRing gives every rank 256 tokens, so a sequence has a ring of 1, 2 or 4 ranks; the
other loop shares every sequence among all ranks. The losses of all steps are equal.
"""

from __future__ import annotations

import argparse as source_of_documents
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from longring import ContextParallel, CpGrid, StatefulLoader
from longring.adapters.hugging_face import model_inputs, register
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, BATCH_TOKENS, BUCKETS = 8, 2048, (128, 256, 512, 1024)
CLIP_NORM, WEIGHT_DECAY, BETAS = 0.5, 0.1, (0.9, 0.95)
VOCABULARY, NORM_EPSILON, ROPE_BASE = 512, 1e-5, 1e5
RECIPE = f"""
run_directory = "DIRECTORY/run"
init.from = "DIRECTORY/llama"
[data]
directory = "DIRECTORY/data"
min_bucket_tokens = {min(BUCKETS)}
max_bucket_tokens = {max(BUCKETS)}
source = {{ kind = "json", path = "DIRECTORY/documents.jsonl" }}
tokenizer = {{ vocab_size = 500 }}
[model]
num_layers = 2
hidden_size = 64
num_heads = 4
num_kv_heads = 2
ffn_hidden_size = 128
vocab_size = {VOCABULARY}
norm_epsilon = {NORM_EPSILON}
rope_base = {ROPE_BASE}
[parallel]
tokens_per_rank = 256
cp.schedule = "token_ring"
[train]
steps = {STEPS}
global_batch_tokens = {BATCH_TOKENS}
learning_rate = 3e-3
min_learning_rate = 1e-3
weight_decay = {WEIGHT_DECAY}
beta1 = {BETAS[0]}
beta2 = {BETAS[1]}
clip_grad_norm = {CLIP_NORM}
dtype = "float32"
"""


def longring(*words: str | Path) -> None:
    """Run a `longring` command."""
    # -P: no folder of a checkout shadows a package.
    subprocess.run([sys.executable, "-P", "-m", "longring", *words], check=True, stdout=subprocess.DEVNULL)


def longring_records(directory: Path) -> list[dict]:
    """Write a recipe, prepared data and the weights of a Llama; train it and return the record of every step."""
    recipe = directory / "recipe.toml"
    recipe.write_text(RECIPE.replace("DIRECTORY", str(directory)))
    text = Path(source_of_documents.__file__).read_text()
    documents = [text[start : start + 4000] for start in range(0, 80_000, 1000)]
    (directory / "documents.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in documents))
    longring("prepare", recipe)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
    )
    LlamaForCausalLM(config).save_pretrained(directory / "llama")
    shutil.copy(directory / "data" / "tokenizer.json", directory / "llama")
    longring("train", recipe, "--ranks", "4")
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def transformers_losses(directory: Path, learning_rates: Sequence[float]) -> Iterator[float]:
    """Train the Llama with LongRing's attention over all ranks and yield the loss of every step. Collective."""
    register()
    parallel = ContextParallel(None, CpGrid.token_ring(dist.get_world_size()))
    sequences = {bucket: parallel.sequence(bucket) for bucket in BUCKETS}
    model = LlamaForCausalLM.from_pretrained(directory / "llama", attn_implementation="longring")
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    # One replica, the ring of all ranks, takes the whole batch of a step at once.
    loader = StatefulLoader(
        directory / "data", steps=STEPS, global_batch_tokens=BATCH_TOKENS, tokens_per_rank=BATCH_TOKENS
    )
    for batch, learning_rate in zip(loader, learning_rates, strict=True):
        loss = model(**model_inputs(sequences[batch.bucket], batch.tokens, shift_labels=batch.labels)).loss
        loss.backward()
        dist.all_reduce(loss.detach())
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def main() -> str:
    """Train twice and return the losses as a table. Collective."""
    with tempfile.TemporaryDirectory() as made:
        # The ranks use the directory of rank 0, which runs the commands while the others wait.
        shared = [(made, longring_records(Path(made)) if dist.get_rank() == 0 else [])]
        dist.broadcast_object_list(shared)
        directory, records = shared[0]
        losses = list(transformers_losses(Path(directory), [record["learning_rate"] for record in records]))
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
