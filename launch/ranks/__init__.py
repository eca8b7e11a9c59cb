"""The processes of a run: start, stop, watchdog, logs, and checks of the node."""
