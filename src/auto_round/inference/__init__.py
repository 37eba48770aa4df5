"""Inference: checkpoints of this package run inside Transformers."""
