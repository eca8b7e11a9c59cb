"""Lines that a user writes, and seconds to the first step, for the same job by LongRing and by other projects.

    python benchmarks/same_job.py --json rows.json
    python benchmarks/same_job.py --megatron-lm ../Megatron-LM   # a clone

The job: JSON lines of text and a tokenizer are there; train a Llama of 6 layers of 256 on contexts of 4,096 tokens that
hold several documents, for one step of one context, on a CPU: in one process, and with the context over two. For each
project, lib/same_job has the file `commands` and the files that these read, as a user would write them.

- lines: all that are no comment, no docstring and not empty. Python is formatted by ruff at 120 columns; every setting
  of a file and every option of a command, but torchrun's, has a line of its own.
- seconds: from the first command to the end of the last, installed packages given. All of a process's threads are one.

A project that is not installed or cannot run has its error, and its lines are counted all the same.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.script import Row, make_parser, make_table, write_record
from lib.standard_library import corpus
from longring.data.config import TokenizerConfig
from longring.data.prepare.train_tokenizer import train_tokenizer
from rich.console import Console

JOBS = Path(__file__).parent / "lib" / "same_job"
PACKAGES = {
    "longring": "longring",
    "transformers": "transformers",
    "torchtitan": "torchtitan",
    "olmo_core": "ai2-olmo-core",
}
"""Packages by the names of their directories in lib/same_job; megatron_lm is a clone."""
LIMIT_S = 600
VOCABULARY = 2048


def lines_of(job: Path) -> int:
    """Return the number of lines that a user writes: without comments, docstrings of one line, and empty lines."""
    lines = (line.strip() for file in sorted(job.iterdir()) for line in file.read_text().splitlines())
    return sum(bool(line) and not line.startswith(("#", '"""')) for line in lines)


def write_inputs(folder: Path, characters: int) -> None:
    """Write what every job begins with: text.jsonl, and a tokenizer as a directory of transformers."""
    texts = corpus(characters)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(
        train_tokenizer(texts, TokenizerConfig(vocab_size=VOCABULARY))
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": TokenizerConfig().boundary}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))


def run(member: str, folder: Path, ranks: int, variables: Mapping[str, str]) -> Row:
    """Run a member's commands in a new directory with the inputs in `folder`; return its seconds, or its error."""
    here = folder / f"{member}-{ranks}"
    shutil.copytree(JOBS / member, here)
    for name in ("text.jsonl", "tokenizer"):
        (here / name).symlink_to(folder / name)
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "RANKS": str(ranks)}
    others = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # ranks import job.py
    before, started = getrusage(RUSAGE_CHILDREN), time.perf_counter()
    with (here / "output").open("w+") as output:
        command = ["timeout", str(LIMIT_S), "bash", "-e", "commands"]
        done = subprocess.run(
            command, cwd=here, env={**others, **own, **variables}, stdout=output, stderr=subprocess.STDOUT
        )
        seconds, after = time.perf_counter() - started, getrusage(RUSAGE_CHILDREN)
        output.seek(0)
        said = output.read()
    if done.returncode:
        late = done.returncode == 124  # by timeout
        return {"ranks": ranks, "error": f"no step within {LIMIT_S} s" if late else error_of(said)}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"ranks": ranks, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def error_of(output: str) -> str:
    """Return the last error in what commands have printed, that of torchrun itself left out; or the last line."""
    lines = [re.sub(r"^(\[rank\d+\]: ?)+", "", line).strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line) and "ChildFailed" not in line]
    return (errors or lines or ["no message"])[-1]


def version_of(member: str, clone: Path) -> str:
    """Return the version of a member's package, or the tag or commit of its clone; "" if it is not there."""
    if member == "megatron_lm":
        found = subprocess.run(
            ["git", "-C", str(clone), "describe", "--tags", "--always"], capture_output=True, text=True
        )
        return found.stdout.strip()
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(PACKAGES[member])
    return ""


def show(rows: list[Row]) -> None:
    """Print lines and seconds of each member, and below the table the errors."""
    table = make_table("The same job", ("project", "lines", "1 process, s", "over 2 ranks, s"), left=("project",))
    for row in rows:
        seconds = [f"{one['seconds']:.1f}" if "seconds" in one else "error" for one in row["runs"]]
        table.add_row(row["member"], str(row["lines"]), *seconds)
    console = Console()
    console.print(table)
    for row in rows:
        for one in row["runs"]:
            if "error" in one:
                said = f"{row['member']}, ranks = {one['ranks']}: {one['error']}"
                console.print(said, highlight=False, markup=False)


def main() -> int:
    parser = make_parser(__doc__ or "", quick="LongRing and transformers alone")
    parser.add_argument(
        "--megatron-lm", metavar="DIR", default="Megatron-LM", help="clone of github.com/NVIDIA/Megatron-LM"
    )
    options = parser.parse_args()
    members, all_ranks, characters = {
        "full": ((*PACKAGES, "megatron_lm"), (1, 2), 4_000_000),
        "quick": (("longring", "transformers"), (1, 2), 4_000_000),
        "smallest": (("longring",), (1,), 300_000),
    }[options.size]
    clone = Path(options.megatron_lm).absolute()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, characters)
        for member in members:
            path = {"MEGATRON_LM": str(clone), "PYTHONPATH": str(clone)} if member == "megatron_lm" else {}
            runs = [run(member, folder, ranks, path) for ranks in all_ranks]
            version = version_of(member, clone)
            rows.append({"member": member, "version": version, "lines": lines_of(JOBS / member), "runs": runs})
    show(rows)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
