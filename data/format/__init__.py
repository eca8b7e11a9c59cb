"""What prepared data is on disk: manifest, shards, ledger, tokenizer; and the reader of its sequences."""
