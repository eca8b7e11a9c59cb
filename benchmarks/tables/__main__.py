"""Write the tables of documents, and speeds.json, from records of benchmarks: `python benchmarks/tables`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds `tables` also under PYTHONSAFEPATH
from tables import TABLES, speeds
from tables.table import ROOT


def main() -> None:
    """Write each table into its document, and name the documents that changed."""
    for document in dict.fromkeys(table.document for table in TABLES):
        file = ROOT / "docs" / document
        text = before = file.read_text()
        for table in TABLES:
            text = table.written(text) if table.document == document else text
        if text != before:
            file.write_text(text)
            print(f"docs/{document}: changed")
    if (text := speeds.speeds_text()) != speeds.FILE.read_text():
        speeds.FILE.write_text(text)
        print(f"{speeds.FILE.relative_to(ROOT)}: changed")


if __name__ == "__main__":
    main()
