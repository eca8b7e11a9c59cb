"""Preparation: documents to prepared data, with one process per input shard."""
