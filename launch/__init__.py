"""The roof: command line, configuration, the train loop, checkpoints, metrics. Imports every column."""

from .ranks.logs import hold_warnings

hold_warnings()
