"""Closed forms of removal, addition, exchange and refit."""
