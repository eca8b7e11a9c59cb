"""Cost of train.deterministic: the same training step with the switch off and on, in turns.

    python benchmarks/deterministic.py --json rows.json   # three minutes
    python benchmarks/deterministic.py --quick            # the smallest model

Times are medians; the ratio is the median of the ratios within a turn.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import torch
from lib.one_rank import count_parameters, one_rank
from lib.script import Row, make_parser, make_table, seconds_of, write_record
from longring.launch.train import use_deterministic_operations
from rich.console import Console

SIZES = [(128, 4, 512), (256, 6, 512), (512, 8, 1024)]


def measure(folder: Path, width: int, layers: int, tokens: int, turns: int) -> Row:
    """Return the seconds of a step with the switch off and on, and their ratio."""
    trainer = one_rank(folder, width, layers, tokens)
    times: dict[bool, list[float]] = {False: [], True: []}
    trainer.step()
    for turn in range(turns):
        for deterministic in (False, True) if turn % 2 else (True, False):
            use_deterministic_operations(deterministic)
            times[deterministic].append(seconds_of(trainer.step))
    use_deterministic_operations(False)
    return {
        "parameters": count_parameters(trainer.engine),
        "tokens": tokens * trainer.engine.gradient_accumulation_steps(),
        "off_s": statistics.median(times[False]),
        "on_s": statistics.median(times[True]),
        "ratio": statistics.median(on / off for off, on in zip(times[False], times[True], strict=True)),
    }


def main() -> int:
    options = make_parser(__doc__ or "", quick="the smallest model: under a minute").parse_args()
    sizes = {"full": SIZES, "quick": SIZES[:1], "smallest": [(64, 1, 128)]}[options.size]
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    columns = ("parameters", "tokens", "off, ms", "on, ms", "on / off")
    table = make_table(f"A training step on one {device}, train.deterministic off and on", columns)
    rows = []
    for width, layers, tokens in sizes:
        with tempfile.TemporaryDirectory() as folder:
            turns = 2 if options.size == "smallest" else 10
            row = measure(Path(folder) / "run", width, layers, tokens, turns)
        rows.append(row)
        shape = f"{row['parameters'] / 1e6:.1f}M", f"{row['tokens']:,.0f}"
        table.add_row(*shape, f"{1e3 * row['off_s']:,.0f}", f"{1e3 * row['on_s']:,.0f}", f"{row['ratio']:.3f}")
    Console(width=100).print(table)
    write_record(options.json, {"rows": rows}, "cuda" if cuda else "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
