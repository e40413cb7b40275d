"""What reads a group: the layers that are measured and refitted."""
