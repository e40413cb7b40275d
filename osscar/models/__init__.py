"""Models by name: packaged, of transformers, of torchvision, and code of a user's own."""
