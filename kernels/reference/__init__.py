"""The plain-torch twin of every kernel: what tests compare with and what runs where there is no GPU."""
