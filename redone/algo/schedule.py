"""The learning rate of a step."""

from __future__ import annotations

import math

from redone.config.schema import OptimConfig


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Rate of step `step` (from 0; rollout steps of RL, optimizer steps of SFT).

    Linear warm-up reaches the peak at step lr_warmup_steps - 1 (lr_warmup_ratio: that share of all steps);
    then the rate is constant, or decays (linear,
    cosine) to min_lr at the last of `total_steps`.
    """
    warmup = optim.lr_warmup_steps
    if optim.lr_warmup_ratio is not None:
        warmup = math.ceil(optim.lr_warmup_ratio * total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.lr_decay_style == "constant":
        return optim.lr
    span = max(1, total_steps - 1 - warmup)
    progress = min(1.0, (step - warmup) / span)
    share = 1.0 - progress if optim.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * share
