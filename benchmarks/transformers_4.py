"""Logits of models that LongRing writes in transformers 4, beside those of the installed transformers 5.

    pip install --target old --no-deps 'transformers==4.57.*' \\
        'huggingface_hub<1' 'tokenizers<0.23'
    python benchmarks/transformers_4.py --packages old    # a minute

The models are those of tests/launch/test_families.py: every family and scaling, small and random. config.json is what
LongRing writes for them. Both versions compute in fp64 with RoPE angles in fp32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import torch
from lib import ROOT
from lib.script import Row, make_parser, make_table, write_record
from longring.model.families.read import read_config
from longring.model.families.write import write_config
from rich.console import Console
from safetensors.torch import save_file

CASES = {"quick": ("llama-3.1", "qwen2-yarn", "olmo3"), "smallest": ("llama",)}
READER = """
import json, sys, torch, transformers
found = {"version": transformers.__version__}
for directory in sys.argv[1:]:
    expected = torch.load(f"{directory}/expected.pt")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float64, attn_implementation="eager"
    )
    logits = model(expected["tokens"]).logits[0].detach()
    error, scale = (x.square().mean().sqrt() for x in (logits - expected["logits"], expected["logits"]))
    found[directory] = (error / scale).item()
print(json.dumps(found))
"""
"""Program of the other version: the relative error of the logits of each directory."""


def families() -> Any:
    """Return the module of the tests of families."""
    sys.path.append(str(ROOT / "tests"))  # its helpers
    spec = importlib.util.spec_from_file_location("test_families", ROOT / "tests" / "launch" / "test_families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(tests: Any, case: str, directory: Path) -> None:
    """Write the model of a case, and the tokens and logits of the installed transformers."""
    tree, weights, tokens, exact = tests.oracle_of(case)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(write_config(read_config(tree))))
    kept = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    torch.save({"tokens": tokens[:, :-1], "logits": exact["logits"]}, directory / "expected.pt")


def main() -> int:
    parser = make_parser(__doc__ or "", quick="three models")
    parser.add_argument(
        "--packages", metavar="DIR", help="directory with the other version (default: the installed one)"
    )
    options = parser.parse_args()
    tests = families()
    with tempfile.TemporaryDirectory() as directory:
        paths = {case: Path(directory) / case for case in CASES.get(options.size, tests.CASES)}
        for case, path in paths.items():
            write(tests, case, path)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        if options.packages:
            environment["PYTHONPATH"] = str(Path(options.packages).resolve())
        command = [sys.executable, "-W", "ignore", "-c", READER, *map(str, paths.values())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=directory)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
    rows: list[Row] = [
        {"model": case, "version": found["version"], "logits": found[str(path)]} for case, path in paths.items()
    ]
    table = make_table(
        f"Relative error of logits in transformers {found['version']}", ["model", "logits"], left={"model"}
    )
    for row in rows:
        table.add_row(row["model"], f"{row['logits']:.1e}")
    Console().print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
