"""Measures of a model: perplexity and distance between two models' predictions."""
