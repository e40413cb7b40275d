"""The exported form of a model, and how it is cut."""
