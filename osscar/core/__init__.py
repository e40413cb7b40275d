"""What every room uses: errors, progress, files, modules."""
