"""Checkpoints: format on disk, saving in the background, loading on any mesh."""
