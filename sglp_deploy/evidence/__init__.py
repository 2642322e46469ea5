"""A model and calibration data in, what planners decide by out: tokens, and statistics of every layer."""
