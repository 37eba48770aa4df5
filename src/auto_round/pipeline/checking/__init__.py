"""What was written is read back as users read it."""
