"""What train.deterministic costs: the same training step with the switch off and on, in turns.

.venv/bin/python benchmarks/deterministic.py [--quick] [--json FILE]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
import torch
from lib.one_rank import one_rank
from longring.launch.train import use_deterministic_operations
from rich.console import Console
from rich.table import Table

SIZES = [(128, 4, 512), (256, 6, 512), (512, 8, 1024)]


def measure(folder: Path, width: int, layers: int, tokens: int, turns: int) -> dict[str, float]:
    """Seconds of a step, as medians, and the median ratio within a turn."""
    trainer = one_rank(folder, width, layers, tokens)
    times: dict[bool, list[float]] = {False: [], True: []}
    trainer.step()
    for turn in range(turns):
        for deterministic in (False, True) if turn % 2 else (True, False):
            use_deterministic_operations(deterministic)
            started = time.perf_counter()
            trainer.step()
            times[deterministic].append(time.perf_counter() - started)
    use_deterministic_operations(False)
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.engine.module.parameters()),
        "tokens": tokens * trainer.engine.gradient_accumulation_steps(),
        "off_s": statistics.median(times[False]),
        "on_s": statistics.median(times[True]),
        "ratio": statistics.median(on / off for off, on in zip(times[False], times[True], strict=True)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model; under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table(title=f"A training step on one {device}, train.deterministic off and on")
    for name in ("parameters", "tokens", "off, ms", "on, ms", "on / off"):
        table.add_column(name, justify="right")
    rows = []
    for width, layers, tokens in SIZES[: 1 if options.quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(Path(folder) / "run", width, layers, tokens, turns=10)
        rows.append(row)
        sizes = f"{row['parameters'] / 1e6:.1f}M", f"{row['tokens']:,.0f}"
        table.add_row(*sizes, f"{1e3 * row['off_s']:,.0f}", f"{1e3 * row['on_s']:,.0f}", f"{row['ratio']:.3f}")
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(
            json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
