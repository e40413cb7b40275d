"""Optimality-gap studies: a directory of problems and records."""
