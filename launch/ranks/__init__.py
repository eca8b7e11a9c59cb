"""The processes of a run: starting them, stopping them, watching them, and the machine below them."""
