"""Error of attention with partial results in 16 bit, and the bytes that they save on the wire.

    python benchmarks/cp_precision.py --json rows.json   # 8,192 tokens
    python benchmarks/cp_precision.py --quick            # about a minute

All ranks of a plan run in this process: one causal sequence in bf16, one head of 128, zigzag. An error is the root mean
square over the whole tensor, relative to attention by its definition in fp64 on the same inputs.

On a CPU the `reference` backend computes the tiles. Within a tile it keeps fp32, as the Triton kernels do except for
probabilities. torch's CPU operator would round every tile's result to bf16, and results in bf16 would then cost
nothing. The first rows are baselines: the exact result rounded to bf16, which is the least possible error; one kernel
over the whole sequence; and torch's scaled_dot_product_attention.

`results` is the dtype of the results that go straight home, which parallel.cp.narrow_results chooses; those of a ring
grow on their way and are always fp32. MiB are the bytes that one rank sends, the mean of all ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.cases import Case, inputs
from lib.exact import exact
from lib.script import Row, make_parser, make_table, write_record
from lib.virtual_ranks import Trial, Whole, backward_in_process, forward_in_process, joined
from longring.parallel.cp import cost
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.plan import Pass
from rich.console import Console
from torch import Tensor

MEMBERS = ("token_ring", "grid", "ring")
RESULTS = ("out", "dq", "dk", "dv")
Found = dict[str, Tensor]


def error_row(member: str, size: int, results: str, got: Found, truth: Found) -> Row:
    """Return the relative errors of one result."""
    errors = {x: float((got[x].double() - truth[x]).norm() / truth[x].norm()) for x in RESULTS}
    return {"member": member, "ranks": size, "results": results, **errors}


def sent_bytes(spec: AttentionSpec, case: Case) -> Row:
    """Return by pass the bytes that one rank sends, the mean of all ranks."""
    shape = cost.AttentionShape(case.heads, case.kv_heads, case.head_dim, narrow_results=spec.narrow_results)
    found: Row = {}
    passes: tuple[Pass, ...] = ("forward", "backward")
    for direction in passes:
        plans = spec.schedule(direction).plans()
        sends = [message for plan in plans for step in plan.steps for message in step.sends]
        num_bytes = sum(shape.bytes_of(message, spec.grid, direction) for message in sends)
        found[f"{direction}_bytes"] = num_bytes // spec.grid.size
    return found


def baselines(trial: Trial, device: str, backend: str, tensors: tuple[Tensor, ...], truth: Found) -> Iterator[Row]:
    """Yield the errors that those of several ranks are compared with."""
    q, k, v, dout = tensors
    yield error_row("the exact, rounded", 1, "", {name: x.to(q.dtype) for name, x in truth.items()}, truth)
    whole = Whole(trial, device, backend, tensors)
    out, lse = whole.forward(None)
    grads = [x.to(q.dtype) for x in whole.backward((out, lse))]
    yield error_row("one kernel", 1, "", dict(zip(RESULTS, (out, *grads), strict=True)), truth)
    asking = [x.clone().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in asking]  # [b, h, s, d], as torch's operator wants them
    out = F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2], is_causal=True).transpose(1, 2)
    grads = torch.autograd.grad(out, asking, dout)
    yield error_row("torch SDPA", 1, "", dict(zip(RESULTS, (out.detach(), *grads), strict=True)), truth)


def all_rows(tokens: int, sizes: list[int], device: str, backend: str) -> Iterator[Row]:
    """Yield the baselines, then every member with results in 16 bit and in fp32."""
    case = Case("causal", tokens, 1, 1, 1, 128, "bfloat16")
    q, k, v, dout = (x.detach() for x in inputs(case, device))
    tensors = (q, k, v, dout)
    one = torch.zeros(tokens, dtype=torch.int32, device=device)
    truth = exact(q, k, v, dout, one, causal=True, window=None, softcap=0.0)
    yield from baselines(Trial(case, 1, ()), device, backend, tensors, truth)
    for size in sizes:
        trial = Trial(case, size, MEMBERS)
        for member in MEMBERS:
            for narrow in (True,) if member == "ring" else (True, False):
                spec = trial.spec(member, backend, narrow_results=narrow)
                outs, saved = forward_in_process(spec, q, k, v)
                grads = backward_in_process(spec, dout, saved, case.kv_heads)
                got = joined(spec, (q, k, v), outs, saved, grads)
                results = "fp32" if member == "ring" or not narrow else "bf16"
                yield error_row(member, size, results, got, truth) | sent_bytes(spec, case)


def show(rows: list[Row], console: Console, title: str) -> None:
    """Print a line for each row, errors in units of 1e-3."""
    columns = ("member", "ranks", "results", *RESULTS, "MiB forward", "MiB backward")
    table = make_table(title, columns, left=("member", "results"))
    for row in rows:
        errors = [f"{1e3 * row[name]:.2f}" for name in RESULTS]
        sent = [f"{row[x] / 2**20:.2f}" if x in row else "" for x in ("forward_bytes", "backward_bytes")]
        table.add_row(row["member"], str(row["ranks"]), row["results"], *errors, *sent)
    console.print(table)


def main() -> int:
    parser = make_parser(__doc__ or "", quick="2,048 tokens, 2 and 4 ranks: about a minute")
    parser.add_argument("--tokens", type=int, default=8192, help="length of the sequence (default: 8192)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16], metavar="N")
    options = parser.parse_args()
    if options.size != "full":
        options.tokens, options.ranks = (2048, [2, 4]) if options.size == "quick" else (128, [4])
    device, backend = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "reference")
    console = Console(width=100)
    rows: list[Row] = []
    with console.status("measuring"):
        for row in all_rows(options.tokens, options.ranks, device, backend):
            rows.append(row)
            write_record(options.json, {"tokens": options.tokens, "rows": rows}, device)
    show(rows, console, f"Relative errors in 1e-3, {options.tokens:,} tokens, 1 head of 128, bf16 on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
