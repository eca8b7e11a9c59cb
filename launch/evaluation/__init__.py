"""Evaluation beyond the held-out loss: tasks, the gain of context, and LongPPL, on sequences spread over ranks."""
