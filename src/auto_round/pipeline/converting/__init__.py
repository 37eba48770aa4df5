"""Quantized folders become folders of another format, code for code."""
