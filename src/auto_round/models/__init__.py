"""What is known of Transformers model code: names, roles, blocks, and weights one block at a time."""
