"""The laboratory: the command line, records, grids and what they measure."""
