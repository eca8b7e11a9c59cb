"""The roof: command line, configuration, the train loop, checkpoints, metrics. Imports every column."""

from .logs import hold_warnings

hold_warnings()
