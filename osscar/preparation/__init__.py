"""The only room that opens a model: what can be pruned, what reads it, and how runs are kept."""
