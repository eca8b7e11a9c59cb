"""One process of a section: calls a generator of benchmarks/ and writes its rows to a file, one by one.

    python -m lib.section_process PARENT MODULE:GENERATOR ARGUMENTS ROWS_FILE

PARENT is the process that waits, ARGUMENTS are keyword arguments as JSON. `lib/sections.py` starts it.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import resource
import sys
from pathlib import Path

from longring.data.processes import end_with_parent

from .sections import LEFT_OUT


def main() -> int:
    parent, name, arguments, rows_file = sys.argv[1:]
    end_with_parent(int(parent))
    faulthandler.enable()  # SIGABRT, which ends a section that is cut off, prints the stack of every thread
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, _, function = name.partition(":")
    try:
        generator = getattr(importlib.import_module(module), function)
        with Path(rows_file).open("a") as file:
            for row in generator(**json.loads(arguments)):
                file.write(json.dumps(row) + "\n")
                file.flush()
    except ModuleNotFoundError as error:
        if not lacks_package(error.name or ""):
            raise
        print(f"left out: this Python has no package {error.name}")
        return LEFT_OUT
    return 0


def lacks_package(module: str) -> bool:
    """Return whether a module is missing with the whole package of others that it is of.

    A module that an installed package lacks is a wrong version, and one of LongRing's own an error.
    """
    package = module.partition(".")[0]
    return package not in ("", "lib", "longring") and importlib.util.find_spec(package) is None


if __name__ == "__main__":
    sys.exit(main())
