"""Weights that begin a run, and weights from and to the directories of Hugging Face models."""
