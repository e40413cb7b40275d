"""What a model is worth: quality, speed and size."""
