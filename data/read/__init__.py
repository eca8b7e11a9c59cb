"""Reading of prepared data as micro-batches: curriculum, batch order, knots, and the loader of a training rank."""
