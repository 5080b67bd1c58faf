"""Whose expert choices the trainer of a mixture of experts repeats."""

from __future__ import annotations

import json
from pathlib import Path

from redone.config.schema import Config, VllmEngine
from redone.layout import ModelShape


def replays_engine(cfg: Config) -> bool:
    """Whether they are the rollout's (R3), which its completions then have to carry.

    trainer.moe.routing_replay=auto: where they can be had, for a mixture of experts in vLLM. Reads the
    model's config.json; a folder that holds no model that we train has no choices either.
    """
    replay = cfg.trainer.moe.routing_replay
    if replay != "auto":
        return replay == "engine"
    if not isinstance(cfg.rollout.engine, VllmEngine):
        return False
    try:
        config = json.loads((Path(cfg.model.path) / "config.json").read_text(encoding="utf-8"))
        return ModelShape.from_hf(config).num_experts > 0
    except (OSError, ValueError, KeyError):
        return False


def without_replay(cfg: Config) -> Config:
    """For engines that answer without a trainer: nobody would repeat what they record."""
    moe = cfg.trainer.moe.model_copy(update={"routing_replay": "off"})
    return cfg.model_copy(update={"trainer": cfg.trainer.model_copy(update={"moe": moe})})
