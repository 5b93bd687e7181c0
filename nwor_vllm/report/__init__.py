"""What records say, as a table on the terminal and one self-contained page. Reads records; never runs anything."""
