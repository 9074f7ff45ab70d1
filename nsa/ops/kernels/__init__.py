"""Triton kernels of the operators, forward and backward; README.md tells the design."""
