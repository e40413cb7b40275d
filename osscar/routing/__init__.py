"""Mixtures of experts: which there are in a model, and how they send tokens to their experts."""
