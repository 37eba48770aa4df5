"""One run by several processes: who they are, and what they do together."""
