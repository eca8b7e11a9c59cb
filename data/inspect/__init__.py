"""Tables and pictures of prepared data: ledger, lengths, cost, curriculum, samples, order."""
