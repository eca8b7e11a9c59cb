"""Prepared data as JSON: its ledgers and buckets, and the run that would train on it."""

from typing import Any

from ..config import LoaderConfig
from ..curriculum_config import CurriculumConfig
from ..format.manifest import Manifest
from ..read.mix import training_order
from .cost import ModelSize, attention_share, speed_up
from .inspect import average_context


def prepared_json(manifest: Manifest) -> dict[str, Any]:
    """Return the size, the ledger of each source and of all, and the buckets of prepared data."""
    return {
        "directory": manifest.store.name,
        "shards": len(manifest.shards),
        "bytes": int(manifest.shards["size_bytes"].sum()),
        "vocab_size": manifest.vocab_size,
        "ledger": manifest.ledger.to_json(),
        "ledgers": {name: ledger.to_json() for name, ledger in manifest.ledgers.items()},
        "buckets": [
            {"length": bucket.length, "sequences": bucket.sequences, "tokens": bucket.tokens}
            for bucket in manifest.buckets("train")
        ],
    }


def inspected_json(
    manifest: Manifest,
    *,
    curriculum: CurriculumConfig,
    loader: LoaderConfig,
    model: ModelSize,
    steps: int,
    seed: int,
    global_batch_tokens: int = 0,
) -> dict[str, Any]:
    """Return what `inspect` prints of the same arguments, without samples and pictures.

    Raises ValueError if the data is not what its manifest says.
    """
    for _ in manifest.verify():
        pass
    found = prepared_json(manifest)
    for entry, bucket in zip(found["buckets"], manifest.buckets("train"), strict=True):
        entry["average_context"] = average_context(manifest, bucket) if bucket.sequences else None
    batch = global_batch_tokens or 64 * max(curriculum.lengths_in_use(manifest.lengths))
    order = training_order(manifest, curriculum, loader, steps=steps, global_batch_tokens=batch, seed=seed)
    # [buckets]. All slots have the same number of tokens, so slots stand for tokens in the shares below.
    slots = order.slots_before(len(order.slots) + 1).tolist()
    return found | {
        "verified": True,
        "steps": steps,
        "global_batch_tokens": batch,
        "mix": [
            {
                "source": cell.source,
                "length": cell.length,
                "sequences": cell.sequences,
                "available": cell.available,
                "passes": cell.passes,
                "not_reached_tokens": cell.not_reached_tokens,
            }
            for cell in order.trained(len(order.slots))
        ],
        "mix_is_renewed": curriculum.renewal.rate > 0,  # then these are the shares until the first renewal
        "model": model.name,
        "attention_share": attention_share(model, slots, order.lengths),
        "flops_of_one_length": speed_up(model, slots, order.lengths),
    }
