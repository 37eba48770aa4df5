"""Numbers: grids, groups, scales, formats. Torch only; no files, no modules, no device names."""
