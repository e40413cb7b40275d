"""OSSCAR."""
