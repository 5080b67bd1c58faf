"""Kernels with their PyTorch references; triton is imported on the first fused call only."""
