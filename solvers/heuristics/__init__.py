"""Backends that find a good support fast and claim no more than they can prove."""
