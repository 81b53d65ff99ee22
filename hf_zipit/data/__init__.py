"""Calibration data: what users give, read once, as batches of the models' inputs for every stage."""
