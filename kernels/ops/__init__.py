"""The faces of the kernels: they check what they are given, then run Triton or the twin."""
