"""What a run will take, measured on a few layers."""
