"""A corpus of the Python files of the installed packages, held out by package and without near-duplicates.

    python benchmarks/corpus.py --directory runs/corpus    # five minutes
    python benchmarks/corpus.py --quick                    # packages of 8 MB

An install of LongRing has some 18,000 Python files. They are read once, `longring prepare` and `longring order` find
near-duplicates among all of them, and then packages are held out whole, up to 8% of the characters. `train.jsonl` and
`held_out.jsonl` have a document a line, for `data.source.kind = "json"`. The counts add up: every file is in one of
them or left out for a reason. The experiments on learning train on it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.corpus import CORPUS_SIZES, make_corpus, site_packages
from lib.script import Row, make_parser, make_table, write_record
from rich.console import Console


def show(account: Row) -> None:
    """Print the files of each split and those that are left out."""
    table = make_table(f"{account['files']:,} Python files", ("files", "packages", "number", "characters"), {"files"})
    for row in account["rows"]:
        table.add_row(row["split"], f"{row['packages']:,}", f"{row['files']:,}", f"{row['characters']:,}")
    for reason, number in account["left_out"].items():
        table.add_row(f"left out: {reason}", "", f"{number:,}", "")
    Console().print(table)


def main() -> int:
    parser = make_parser(__doc__ or "", "packages of 8 MB, a minute")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="keep the corpus in a directory")
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="directory of the packages (default: that of this interpreter)"
    )
    options = parser.parse_args()
    site = (options.packages or site_packages()).absolute()
    with tempfile.TemporaryDirectory() as made:
        folder = (options.directory or Path(made)).absolute()
        account = make_corpus(folder, CORPUS_SIZES[options.size], site)
    show(account)
    write_record(options.json, account)
    return 0


if __name__ == "__main__":
    sys.exit(main())
