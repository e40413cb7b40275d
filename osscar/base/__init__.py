"""What every room stands on: files, locks, progress, memory, ranks, errors."""
