"""What models are calibrated and scored with: text, tokens, images, batches."""
