"""What is removed of a model, and the proof that nothing else has changed."""
