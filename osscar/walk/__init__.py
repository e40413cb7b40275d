"""The walk: calibration layer by layer, in which each layer is measured, solved and refitted."""
