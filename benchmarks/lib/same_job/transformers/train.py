"""A step of transformers' Trainer on concatenated documents; documents see each other."""

import os

from accelerate import ParallelismConfig
from datasets import load_dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

tokenizer = PreTrainedTokenizerFast(tokenizer_file="tokenizer/tokenizer.json", eos_token="<|endoftext|>")


def rows(batch):
    ids = [token for text in batch["text"] for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    cut = [ids[first : first + 4096] for first in range(0, len(ids) - 4095, 4096)]
    return {"input_ids": cut, "labels": cut}


text = load_dataset("json", data_files="text.jsonl", split="train")
data = text.map(rows, batched=True, remove_columns=text.column_names)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=16,
    max_position_embeddings=4096,
)
ranks = int(os.environ["RANKS"])
arguments = TrainingArguments(
    output_dir="run",
    max_steps=1,
    per_device_train_batch_size=1,
    learning_rate=8e-4,
    use_cpu=True,
    report_to="none",
    parallelism_config=ParallelismConfig(cp_size=ranks) if ranks > 1 else None,
    fsdp="full_shard" if ranks > 1 else None,
)
Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=data).train()
