"""Recipes: complete configurations as TOML."""
