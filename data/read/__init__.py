"""From prepared data to micro-batches: curriculum, batch order, knots, and the loader of a training rank."""
