"""Symmetric matrices, Gram matrices, and how numbers are checked and rounded."""
