"""Error of a step's gradient in bf16 training by the dtype in which micro-batches are summed, on one rank.

    python benchmarks/gradient_dtype.py --json rows.json   # three minutes
    python benchmarks/gradient_dtype.py --quick            # up to 64

The same micro-batch is repeated, so the exact gradient of a step does not depend on their number; its oracle is the
model in fp32 with the same weights. Errors are root mean squares over those of the exact gradient.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import torch
from lib.one_rank import RECIPE, VOCABULARY, be_the_only_rank
from lib.script import Row, make_parser, make_table, write_record
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank, build_engine
from longring.launch.config import load_recipe
from longring.parallel.fragments import held, refresh
from longring.parallel.mesh import join
from rich.console import Console
from torch import Tensor

TOKENS = 256
SIZES = {"full": (1, 8, 64, 256, 1024), "quick": (1, 8, 64), "smallest": (1, 4)}
"""Numbers of micro-batches of a step."""


def gradient(accumulations: int, dtype: str, gradient_dtype: str) -> Tensor:
    """Return the gradient of one step over equal micro-batches, flat, under ZeRO 1."""
    shape = ["model.hidden_size=128", "model.num_layers=2", "model.ffn_hidden_size=384", "train.clip_grad_norm=0"]
    batch = [f"data.max_bucket_tokens={TOKENS}", f"parallel.tokens_per_rank={TOKENS}"]
    words = [*batch, f"train.global_batch_tokens={TOKENS * accumulations}", f"train.gradient_dtype={gradient_dtype}"]
    recipe = load_recipe(RECIPE, [*shape, *words, f"train.dtype={dtype}", "run_directory=nowhere"])
    mesh = join(recipe.parallel, 1)
    engine = build_engine(recipe, VOCABULARY, mesh)
    for fragment in held(engine, mesh):  # fp32 weights that bf16 has as well
        fragment.tensors["weight"].copy_(fragment.tensors["weight"].bfloat16())
    refresh(engine, mesh, 0)
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1), generator=torch.Generator().manual_seed(0)).to(mesh.device)
    layout = SeqLayout.contiguous(TOKENS)
    attend = attention_on_one_rank("auto", mesh.device, [None])(layout)
    for _ in range(accumulations):
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:], layout, attend).mean())
        engine.step()
    # After one step AdamW's first moment is (1 - beta1) times the gradient.
    return torch.cat([f.tensors["exp_avg"].double() for f in held(engine, mesh)]) / (1 - recipe.train.beta1)


def main() -> int:
    options = make_parser(__doc__ or "", quick="up to 64 micro-batches: some seconds").parse_args()
    be_the_only_rank()
    exact = gradient(1, "float32", "float32")
    columns = ("micro-batches", "float32: error", "bfloat16: error", "bfloat16: norm")
    table = make_table("Gradient of a step by train.gradient_dtype, against fp32 weights and activations", columns)
    rows: list[Row] = []
    for accumulations in SIZES[options.size]:
        row: Row = {"micro_batches": accumulations}
        for dtype in ("float32", "bfloat16"):
            got = gradient(accumulations, "bfloat16", dtype)
            row[f"{dtype}_error"] = float((got - exact).norm() / exact.norm())
            row[f"{dtype}_norm"] = float(got.norm() / exact.norm())
        rows.append(row)
        errors = f"{row['float32_error']:.2%}", f"{row['bfloat16_error']:.2%}"
        table.add_row(f"{accumulations:,}", *errors, f"{row['bfloat16_norm']:.4f}")
    Console(width=100).print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
