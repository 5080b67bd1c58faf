"""What the killed writers build and compare. Importing this imports Megatron-core, before any fork."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from redone.config.schema import Config
from redone.pipeline.folder import DriverState
from redone.trainer.megatron.backend import MegatronTrainer
from redone.weights.digest import digest


def build(model: str, rendezvous: Path, asynchronous: bool) -> MegatronTrainer:
    cfg = Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": ["unused"]},
            "rewards": {},
            "checkpoint": {"asynchronous": asynchronous},
        }
    )
    return MegatronTrainer(cfg, 0, 1, f"file://{rendezvous}")


def digest_of(trainer: Any) -> int:
    """Of all weights."""
    parts = [p.detach().flatten().view(torch.uint8) for m in trainer.modules for p in m.parameters()]
    return digest(torch.cat(parts))


def state_of(step: int, value: int) -> DriverState:
    return DriverState(step=step, stream={"digest": value}, val_history=(), best_step=None, stream_bytes={})
