"""Documents to prepared data: sources, records, decomposition and packing, one process an input shard."""
