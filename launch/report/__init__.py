"""A run read from outside, while it goes on or afterwards: its state, its history, and a page of both."""
