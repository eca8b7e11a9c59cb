"""Weights from and to the directories of Hugging Face models."""
