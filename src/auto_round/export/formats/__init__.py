"""Output formats, one file each; none knows of another. `export.table` lists them."""
