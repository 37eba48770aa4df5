"""Kernels: packed weights times activations, chosen per layer from a table."""
