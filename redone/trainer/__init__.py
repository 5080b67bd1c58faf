"""Training backends behind redone.api.Trainer."""
