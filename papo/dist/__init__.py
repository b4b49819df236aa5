"""What knows of ranks: DeepSpeed, collectives, checkpoints."""
