"""What several tests share: rank processes, error bounds, plain models, faults and small checkpoints."""
