"""What an update is made of: advantages, batches, the loss, polarity's weights, the phase."""
