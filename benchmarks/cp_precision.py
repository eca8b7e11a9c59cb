"""What partial results that travel in 16 bit or in fp32 do to attention's errors, and what they cost on the wire.

    python benchmarks/cp_precision.py --json rows.json  # 8,192 tokens
    python benchmarks/cp_precision.py --quick           # 2,048 tokens, about a minute

All ranks of a plan in this process, inputs in bf16, one causal sequence, one head of 128, zigzag. An error is that of
the whole tensor, root mean square, relative to attention by its definition in fp64 on the same inputs. On a CPU tiles
are computed by the `reference` backend, which keeps fp32 within a tile as the Triton kernels do but for probabilities;
torch's operator for the CPU rounds every tile's result to bf16, so that travelling in bf16 would cost nothing there.
Above the family: rounding the exact result to bf16, the least anyone can err; one kernel over the whole sequence; and
torch's scaled_dot_product_attention. MiB are those that one rank sends, the mean of all ranks. `results` says how
results travel that go straight home, which narrow_results chooses; Ring's grow on their way and travel in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
from full_sizes import exact
from lib.cases import Case, Row, about, inputs
from lib.virtual_ranks import Question, Whole, backward_in_process, forward_in_process, joined
from longring.parallel.cp import cost
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

MEMBERS = ("token_ring", "grid", "ring")
RESULTS = ("out", "dq", "dk", "dv")
Found = dict[str, Tensor]


def error_row(member: str, size: int, results: str, got: Found, truth: Found) -> Row:
    errors = {x: float((got[x].double() - truth[x]).norm() / truth[x].norm()) for x in RESULTS}
    return {"member": member, "ranks": size, "results": results, **errors}


def sent_bytes(spec: Any, case: Case) -> Row:
    """That one rank sends, the mean of all ranks, by pass."""
    shape = cost.AttentionShape(case.heads, case.kv_heads, case.head_dim, narrow_results=spec.narrow_results)
    found: Row = {}
    for direction in ("forward", "backward"):
        plans = [spec.plan(direction, rank)[1] for rank in range(spec.grid.size)]
        sends = [message for plan in plans for step in plan.steps for message in step.sends]
        num_bytes = sum(shape.bytes_of(message, spec.grid, direction) for message in sends)
        found[f"{direction}_bytes"] = num_bytes // spec.grid.size
    return found


def baselines(
    question: Question, device: str, backend: str, tensors: tuple[Tensor, ...], truth: Found
) -> Iterator[Row]:
    """What any number of ranks is measured by."""
    q, k, v, dout = tensors
    yield error_row("the exact, rounded", 1, "", {name: x.to(q.dtype) for name, x in truth.items()}, truth)
    whole = Whole(question, device, backend, tensors)
    out, lse = whole.forward(None)
    grads = [x.to(q.dtype) for x in whole.backward((out, lse))]
    yield error_row("one kernel", 1, "", dict(zip(RESULTS, (out, *grads), strict=True)), truth)
    asking = [x.clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in asking), is_causal=True).transpose(1, 2)
    grads = torch.autograd.grad(out, asking, dout)
    yield error_row("torch SDPA", 1, "", dict(zip(RESULTS, (out.detach(), *grads), strict=True)), truth)


def all_rows(tokens: int, sizes: list[int], device: str, backend: str) -> Iterator[Row]:
    """Baselines, then every member both ways."""
    case = Case("causal", tokens, 1, 1, 1, 128, "bfloat16")
    tensors = tuple(x.detach() for x in inputs(case, device))
    q, k, v, dout = tensors
    one = torch.zeros(tokens, dtype=torch.int32, device=device)
    truth = exact(*tensors, one, causal=True, window=None, softcap=0.0)
    yield from baselines(Question(case, 1, ()), device, backend, tensors, truth)
    for size in sizes:
        question = Question(case, size, MEMBERS)
        for member in MEMBERS:
            for narrow in (True,) if member == "ring" else (True, False):
                spec = question.spec(member, backend, narrow_results=narrow)
                outs, saved = forward_in_process(spec, q, k, v)
                grads = backward_in_process(spec, dout, saved, case.kv_heads)
                got = joined(spec, (q, k, v), outs, saved, grads)
                results = "fp32" if member == "ring" or not narrow else "bf16"
                yield error_row(member, size, results, got, truth) | sent_bytes(spec, case)


def show(rows: list[Row], console: Console, title: str) -> None:
    """Errors in units of 1e-3."""
    table = Table(title=title, title_justify="left", box=box.MARKDOWN)
    columns = ("member", "ranks", "results", *RESULTS, "MiB forward", "MiB backward")
    for column in columns:
        table.add_column(column, justify="left" if column in ("member", "results") else "right")
    for row in rows:
        errors = [f"{1e3 * row[name]:.2f}" for name in RESULTS]
        sent = [f"{row[x] / 2**20:.2f}" if x in row else "" for x in ("forward_bytes", "backward_bytes")]
        table.add_row(row["member"], str(row["ranks"]), row["results"], *errors, *sent)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,048 tokens, 2 and 4 ranks: about a minute")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, with device and versions")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.ranks = 2048, [2, 4]
    device, backend = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "reference")
    console = Console(width=100)
    rows: list[Row] = []
    with console.status("measuring"):
        for row in all_rows(options.tokens, options.ranks, device, backend):
            rows.append(row)
            if options.json:
                told = about(device) | {"tokens": options.tokens}
                options.json.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")
    show(rows, console, f"Relative errors in 1e-3, {options.tokens:,} tokens, 1 head of 128, bf16 on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
