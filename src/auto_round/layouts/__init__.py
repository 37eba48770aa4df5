"""Layouts: how codes and scales lie in the tensors of a file. Order of bits only, no arithmetic."""
