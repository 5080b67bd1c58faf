"""Megatron-core backend: the only folder that imports megatron."""
