"""From a checkpoint to a state: exactly the bytes that each rank needs."""
