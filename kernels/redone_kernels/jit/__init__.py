"""The Triton kernels alone; imported on the first launch, after TRITON_INTERPRET was read."""
