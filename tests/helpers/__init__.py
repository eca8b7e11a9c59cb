"""Helpers of several tests: rank processes, error bounds, plain models, faults, checkpoints and a sandbox."""
