"""The reference of the command line, from the help of each command."""

from __future__ import annotations

import os

from longring.launch import cli

COLUMNS = "100"
"""Width for which the help is formatted."""


def commands_markdown() -> str:
    """Return a section for each command, with its help."""
    os.environ["COLUMNS"] = COLUMNS  # argparse reads it
    _, commands = cli._parsers()
    sections = [f"## longring {name}\n\n```text\n{parser.format_help()}```\n" for name, parser in commands.items()]
    return "\n".join(sections)
