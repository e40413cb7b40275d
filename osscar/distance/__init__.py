"""How far a model is from the dense one, by what both return."""
