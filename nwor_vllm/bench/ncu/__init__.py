"""Nsight Compute: ask whether it can run, run it bounded, read what it wrote, hold it against arithmetic."""
