"""Trainer backends. Importing this package imports no vendor."""

from __future__ import annotations

import importlib

from redone.api import Trainer
from redone.config.schema import Config


def preload(cfg: Config) -> None:
    """Import the backend ahead of time: it takes seconds, and start-up can overlap it with other work."""
    importlib.import_module("redone.trainer.megatron.backend")


def build_trainer(cfg: Config, rank: int, world: int, init_method: str) -> Trainer:
    """Rank `rank` of `world`; `init_method` is torch.distributed's rendezvous (tcp://host:port). Collective.

    Raises ConfigError for an impossible layout and ModelError for an unusable model folder.
    """
    backend = importlib.import_module("redone.trainer.megatron.backend")
    trainer: Trainer = backend.MegatronTrainer(cfg, rank, world, init_method)
    return trainer
