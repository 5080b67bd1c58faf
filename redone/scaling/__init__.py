"""Scaling experiments: one workload on several node counts, measured beside the planner's prediction."""
