"""Documents to batches: sources, tokenizer, dataset decomposition, shards, and the order of training.

`prepare` turns documents into a directory of webdataset shards, with one bucket per sequence length, a manifest, and a
ledger that accounts for every token. `Loader` reads that directory in an order that is a pure function of (seed, step,
sizes) and depends on neither the reading threads, nor the world size, nor what was read before.
"""
