"""Backends that prove their answer optimal."""
