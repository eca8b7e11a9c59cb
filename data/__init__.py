"""Documents to batches: sources, tokenizer, dataset decomposition, shards, and the order in which they are trained on.

`prepare` turns documents into a directory of webdataset shards, one bucket for each sequence length, with a manifest
and a ledger that accounts for every token. `Batches` reads that directory in an order that is a pure function of
(seed, step, sizes): never of workers, of the world size, or of what was read before.
"""
