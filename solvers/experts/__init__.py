"""Which experts of a mixture stay: the problem, exact for any choice, and its backends."""
