"""Triton kernels of the operators, forward and backward; README.md describes the design."""
