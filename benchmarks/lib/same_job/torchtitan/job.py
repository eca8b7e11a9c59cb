"""A run of torchtitan's debug model on local text."""

from datasets import load_dataset
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.config import TrainingConfig
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

DATASETS["local"] = DatasetConfig(
    path="text.jsonl",
    loader=lambda path: load_dataset("json", data_files=path, split="train"),
    sample_processor=lambda sample: sample["text"],
)


def job():
    model = model_registry("debugmodel")
    return Trainer.Config(
        model_spec=model,
        hf_assets_path="tokenizer",
        loss=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(model)),
        optimizer=default_adamw(lr=8e-4),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="local"),
        training=TrainingConfig(local_batch_size=1, seq_len=4096, steps=1),
    )
