"""Lower bounds that no support's loss can be below, with certificates that anyone can re-check."""
