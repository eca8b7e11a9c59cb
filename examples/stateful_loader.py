"""Read prepared data in another trainer's loop, stop within the run, and go on with other ranks.

python examples/stateful_loader.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from longring import StatefulLoader
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.prepare.prepare import prepare
from rich.console import Console

RUN: dict[str, Any] = {"steps": 6, "global_batch_tokens": 1024, "seed": 1}


def main() -> str:
    """Return which sequences were read before and after a restart."""
    with tempfile.TemporaryDirectory() as directory:
        for number in range(20):
            (Path(directory) / f"{number:02}.txt").write_text("a ring of ranks " * (40 + 15 * number))
        data = DataConfig(
            directory=f"{directory}/data",
            source=SourceConfig(kind="text", path=f"{directory}/*.txt"),
            tokenizer=TokenizerConfig(vocab_size=300),
            min_bucket_tokens=64,
            max_bucket_tokens=256,
        )
        prepare(data, Console(quiet=True))

        lines = ["step  bucket  tokens of a rank's micro-batch"]
        loader = StatefulLoader(data.directory, tokens_per_rank=512, **RUN)
        for batch in loader:
            lines.append(f"{batch.step:4}  {batch.bucket:6}  {tuple(batch.tokens.shape)}")
            if batch.step == 3 and loader.state_dict()["tokens"] % RUN["global_batch_tokens"] == 0:
                break
        state = loader.state_dict()  # plain values: any checkpoint holds them
        lines.append(f"stopped after {state['tokens']} tokens; now 4 ranks of 128 tokens, of which rank 1 reads")

        loader = StatefulLoader(data.directory, tokens_per_rank=128, rank=1, num_ranks=4, **RUN)
        loader.load_state_dict(state)
        lines += [f"{b.step:4}  {b.bucket:6}  {tuple(b.tokens.shape)}, shared by {b.ranks}" for b in loader]
        return "\n".join(lines)


if __name__ == "__main__":
    print(main())
