"""Held-out evaluation, statistics and baselines."""
