"""Triton kernels, imported as nwor_vllm.kernels; `reference` holds the one plain-torch twin of each."""
