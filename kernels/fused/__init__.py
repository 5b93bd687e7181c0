"""The Triton kernels and how they are launched. Imported only where Triton runs."""
