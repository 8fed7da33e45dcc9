"""Fused kernels for GPUs, written in Triton, which is imported only when one is needed."""
