"""The calibration data on their way through a model, and the problems that they pose."""
