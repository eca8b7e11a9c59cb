"""Parallelism: the mesh of ranks, DeepSpeed's ZeRO engine, context parallelism."""
