"""From hidden states and the head's weight to logits, a chunk of tokens at a time."""
