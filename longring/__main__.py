"""`python -m longring`: the `longring` command."""

from .launch.cli import main

raise SystemExit(main())
