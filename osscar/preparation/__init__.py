"""What opens a model, finds what can be pruned of it, and keeps journals of what is done to it."""
