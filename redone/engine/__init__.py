"""Rollout engines behind redone.api.Engine: one file per engine."""
