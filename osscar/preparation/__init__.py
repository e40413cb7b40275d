"""The only room that opens a model: what can be pruned, and what reads it."""
