"""What is known of a model before a weight is read: its layers, blocks and tensors. Values only, no torch."""
