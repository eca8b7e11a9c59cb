"""Read prepared data in another trainer's loop, stop within the run, and go on with other ranks.

python examples/stateful_loader.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from longring import StatefulLoader

RUN: dict[str, Any] = {"steps": 6, "global_batch_tokens": 1024, "seed": 1}
SETTINGS = """
data.source.kind=text
data.source.path={directory}/*.txt
data.directory={directory}/data
data.held_out_fraction=0
data.tokenizer.vocab_size=300
data.min_bucket_tokens=64
data.max_bucket_tokens=256
train.global_batch_tokens=1024
"""
"""Settings that replace those of the demo's recipe."""


def prepare(directory: str) -> None:
    """Write documents to a directory and prepare them, as `longring prepare RECIPE KEY=VALUE ...` does."""
    for number in range(20):
        (Path(directory) / f"{number:02}.txt").write_text("a ring of ranks " * (40 + 15 * number))
    recipe = Path(__file__).parents[1] / "launch" / "recipes" / "demo.toml"
    words = SETTINGS.format(directory=directory).split()
    # -P: no folder of a checkout shadows a package.
    command = [sys.executable, "-P", "-m", "longring", "prepare", recipe, "--json", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> str:
    """Return which sequences were read before and after a restart."""
    with tempfile.TemporaryDirectory() as directory:
        prepare(directory)
        data = f"{directory}/data"

        lines = ["step  bucket  tokens of a rank's micro-batch"]
        loader = StatefulLoader(data, tokens_per_rank=512, **RUN)
        for batch in loader:
            lines.append(f"{batch.step:4}  {batch.bucket:6}  {tuple(batch.tokens.shape)}")
            if batch.step == 3 and loader.state_dict()["tokens"] % RUN["global_batch_tokens"] == 0:
                break
        state = loader.state_dict()  # plain values: any checkpoint holds them
        lines.append(f"stopped after {state['tokens']} tokens; now 4 ranks of 128 tokens, of which rank 1 reads")

        loader = StatefulLoader(data, tokens_per_rank=128, rank=1, num_ranks=4, **RUN)
        loader.load_state_dict(state)
        lines += [f"{b.step:4}  {b.bucket:6}  {tuple(b.tokens.shape)}, shared by {b.ranks}" for b in loader]
        return "\n".join(lines)


if __name__ == "__main__":
    print(main())
