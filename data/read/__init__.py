"""Prepared data to batches: curriculum, batch order, knots, and the loader that a training rank runs."""
