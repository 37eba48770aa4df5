"""Quantized weights as they lie on disk: what configurations say of them, and their numbers."""
