"""Weights that are on disk while they are not used."""
