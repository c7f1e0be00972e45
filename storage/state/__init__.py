"""From a training script's own objects to tensors and values with names, and back."""
