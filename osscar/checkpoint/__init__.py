"""Smaller models on disk: written, read back, compared."""
