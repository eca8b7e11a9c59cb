"""The roof: command line, configuration, the train loop, checkpoints, metrics. Imports every column."""
