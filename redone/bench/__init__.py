"""Throughput benchmarks of product code: each part alone, with the machine's ceilings measured beside it."""
