"""Which grid of ranks divides the attention of each bucket: decided, measured, remembered and shown."""
