"""Rewards: one family per task, raw score in [0, 1]."""
