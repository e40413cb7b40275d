"""What people read: pages, plots, and tables for the terminal."""
