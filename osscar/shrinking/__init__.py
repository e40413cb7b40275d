"""Physical removal of units, and the proof that nothing else has changed."""
