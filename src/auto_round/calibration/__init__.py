"""Calibration: from the name of a data set to rows of token ids, and what they do to a layer's inputs."""
