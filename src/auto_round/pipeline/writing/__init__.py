"""Outputs of a job: tensors as they come, what lies beside them, and what a continued run must agree with."""
