"""The tables of documents that show records of benchmarks; `python benchmarks/tables` writes them."""

from __future__ import annotations

from . import context_parallelism, data, learning, training

TABLES = [*context_parallelism.TABLES, *data.TABLES, *learning.TABLES, *training.TABLES]
