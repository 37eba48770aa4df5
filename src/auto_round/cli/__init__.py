"""The commands: argument reading, progress, lists and the summary."""
