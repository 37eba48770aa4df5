"""Tuning of weight rounding, block by block. Torch only; works on any callable block."""
