"""Command line, configuration, training loop, checkpoints and metrics: the package that imports all others."""

from .ranks.logs import hold_warnings

hold_warnings()  # here, because the libraries warn while the modules below are imported
