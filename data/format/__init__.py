"""Prepared data on disk: manifest, shards, ledger and tokenizer, and the reader of its sequences."""
