"""The one command for a machine with a GPU: correctness of the kernels there, then their speed.

    python benchmarks/gpu_check.py --json benchmarks/results/attention_h200_2026-11-21.json
    python benchmarks/gpu_check.py --quick          # about a minute; also runs on a CPU, in small sizes

Needs torch, pytest and rich alone: neither an install of LongRing nor megatron-core or DeepSpeed. Causal attention,
forward and backward, beside torch's own scaled_dot_product_attention in the same run; a row's ratio is torch's time
over ours. FLOPs count the visible half of the scores: 2 products forward, 5 backward.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("kernels", "parallel", "data", "model", "launch")


def uninstalled_package(directory: Path) -> Path:
    """A folder to put on the path, where `longring.kernels` is this checkout's `kernels/`, and so on."""
    package = directory / "longring"
    package.mkdir()
    for column in COLUMNS:
        (package / column).symlink_to(ROOT / column, target_is_directory=True)
    return directory


def median_ms(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call, after two calls to warm up."""
    times = []
    for number in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            times.append((time.perf_counter() - started) * 1e3)
    return median(times)


def attention_rows(device: str, lengths: list[int], repeats: int) -> list[dict[str, object]]:
    """Times of one attention layer, 32 or fewer query heads of 128, at each length: MHA and 8:1 GQA."""
    attention = importlib.import_module("longring.kernels.attention").attention
    layouts = importlib.import_module("longring.kernels.layout").SeqLayout
    heads, dim = (32, 128) if device == "cuda" else (8, 64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def torch_attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    rows = []
    for tokens in lengths:
        for kv_heads in (heads, heads // 8):
            shapes = [(1, tokens, h, dim) for h in (heads, kv_heads, kv_heads)]
            q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
            layout = layouts.contiguous(tokens)
            dout = torch.randn_like(q)
            members = {"ours": lambda *x, at=layout: attention(*x, at), "torch": torch_attention}
            ms = {}
            for name, member in members.items():
                with torch.no_grad():
                    ms[name, "forward"] = median_ms(lambda m=member, x=(q, k, v): m(*x), device, repeats)
                out = member(q, k, v)
                ms[name, "backward"] = median_ms(
                    lambda o=out, x=(q, k, v), d=dout: torch.autograd.grad(o, x, d, retain_graph=True), device, repeats
                )
            for direction, products in (("forward", 2), ("backward", 5)):
                flops = products * heads * dim * tokens * tokens  # 2 FLOPs a multiply-add, half the scores
                ours, theirs = ms["ours", direction], ms["torch", direction]
                rows.append(
                    {
                        "tokens": tokens,
                        "heads": heads,
                        "kv_heads": kv_heads,
                        "head_dim": dim,
                        "direction": direction,
                        "ms": round(ours, 3),
                        "torch_ms": round(theirs, 3),
                        "tflops": round(flops / ours / 1e9, 2),
                        "ratio": round(theirs / ours, 3),
                    }
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, with device and versions")
    options = parser.parse_args()
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    console.print(about)
    with tempfile.TemporaryDirectory() as directory:
        path = uninstalled_package(Path(directory))
        sys.path.insert(0, str(path))
        code = f"import sys; sys.path.insert(0, {str(path)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        tests = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "kernels")]
        if status := subprocess.run(tests, cwd=ROOT).returncode:
            console.print("[bold red]error:[/] a wrong kernel has no speed: the tests above failed")
            return status
        lengths = [1024, 2048] if options.quick or device == "cpu" else [2048, 8192, 16384, 32768, 65536, 131072]
        rows = attention_rows(device, lengths, repeats=5 if options.quick else 10)
    table = Table(title="Causal attention; ratio = torch's time / ours", title_justify="left", box=box.SIMPLE_HEAD)
    for name in rows[0]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
