"""redone: post-training of large language models for a domain, on Megatron-core, vLLM and Ray."""

__version__ = "0.1.0"
