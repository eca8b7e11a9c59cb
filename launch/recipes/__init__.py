"""Recipes in TOML: complete settings of a run."""
