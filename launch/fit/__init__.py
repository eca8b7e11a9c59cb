"""Memory and time of a recipe on some number of ranks, before any of them starts."""
