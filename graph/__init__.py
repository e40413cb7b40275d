"""Coupling groups: which slices of which tensors must be kept or removed together."""
