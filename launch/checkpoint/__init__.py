"""Checkpoints: their format, saving in the background, loading on any mesh."""
