"""Files of a checkpoint: read by byte range, write in any order, survive a crash."""
