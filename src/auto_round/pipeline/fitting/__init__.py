"""How a run fits into the memory that is there: what it needs, and where it can do with less."""
