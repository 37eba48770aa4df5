"""Groups of blocks are run and tuned, and both streams of hidden states move past them."""
