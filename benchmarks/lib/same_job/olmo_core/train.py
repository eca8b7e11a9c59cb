"""A step of OLMo-core on concatenated documents; documents see each other with torch's attention."""

import json
import os
from pathlib import Path

import numpy as np
from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig
from olmo_core.train import Duration, TrainerConfig, prepare_training_environment, teardown_training_environment
from olmo_core.train.train_module import (
    TransformerContextParallelConfig,
    TransformerDataParallelConfig,
    TransformerTrainModuleConfig,
)
from tokenizers import Tokenizer


def write_tokens():
    tokenizer = Tokenizer.from_file("tokenizer/tokenizer.json")
    ids = []
    for line in Path("text.jsonl").read_bytes().splitlines():
        ids += [*tokenizer.encode(json.loads(line)["text"]).ids, tokenizer.token_to_id("<|endoftext|>")]
    np.array(ids, np.uint16).tofile("tokens.npy")
    return TokenizerConfig(vocab_size=2048, eos_token_id=ids[-1], pad_token_id=ids[-1])


def train():
    ranks = int(os.environ["RANKS"])
    model = TransformerConfig.llama_like(
        d_model=256,
        vocab_size=2048,
        n_layers=6,
        n_heads=16,
        attn_backend=AttentionBackendName.torch,
        feed_forward=FeedForwardConfig(hidden_size=768, bias=False),
    )
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=4096,
        max_sequence_length=4096,
        optim=AdamWConfig(lr=8e-4),
        dp_config=TransformerDataParallelConfig(name=DataParallelType.fsdp) if ranks > 1 else None,
        cp_config=TransformerContextParallelConfig.ulysses(ranks) if ranks > 1 else None,
    ).build(model.build(init_device="meta"))
    data = NumpyFSLDatasetConfig(
        paths=["tokens.npy"],
        sequence_length=4096,
        tokenizer=write_tokens(),
        work_dir="work",
    ).build()
    loader = NumpyDataLoaderConfig(global_batch_size=4096, seed=0)
    loader = loader.build(data, dp_process_group=module.dp_process_group)
    trainer = TrainerConfig(save_folder="run", work_dir="work", max_duration=Duration.steps(1))
    trainer.build(module, loader).fit()


if __name__ == "__main__":
    prepare_training_environment(backend="gloo")
    train()
    teardown_training_environment()
