"""A look at prepared data: ledger, lengths, cost, schedule, samples and pictures."""
