"""Real model shapes on the meta device, through the modules that train: parameters and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parents[2] / "configs/models"


def build(model: str) -> dict[str, Any]:
    """Parameters of the module, and whether the name table covers it and gives every shape."""
    from megatron.core import parallel_state

    from redone.config.schema import TrainerConfig
    from redone.layout import ModelShape
    from redone.trainer.megatron import model as module
    from redone.trainer.megatron.convert import local_parameters
    from redone.trainer.megatron.device import prepare
    from redone.trainer.megatron.names import rules, shard_shape

    prepare("cpu")
    shape = ModelShape.from_hf(json.loads((ROOT / model / "architecture/config.json").read_text()))
    parallel_state.initialize_model_parallel()
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    meta = torch.device("meta")
    trainer = TrainerConfig()
    config = module.transformer_config(shape, trainer, torch.bfloat16)
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: meta),
        mock.patch.object(module, "device", lambda: meta),
        meta,
    ):
        chunks = module.build_modules(shape, config, trainer)
    found = local_parameters(chunks, shape)
    table = {r.mcore: shard_shape(r, shape, 1) for r in rules(shape)}
    tied = {r.mcore for r in rules(shape) if r.alias}
    parallel_state.destroy_model_parallel()
    return {
        "parameters": sum(p.numel() for p in found.values()),
        "device": sorted({p.device.type for p in found.values()}),
        "missing": sorted(set(table) - set(found) - tied),
        "misshapen": [n for n, p in found.items() if tuple(p.shape) != table[n]],
    }
