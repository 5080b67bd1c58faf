"""Engines that hold block-quantised weights, although the model folder holds others: how they are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from redone.config.schema import Config
from redone.weights.quantize import BLOCK


def quantized_arguments(cfg: Config) -> dict[str, Any]:
    """vLLM's EngineArgs: the config.json of an fp8 checkpoint, and no weights before the first update."""
    if cfg.weights.quantization == "none":
        return {}
    config = json.loads((Path(cfg.model.path) / "config.json").read_text(encoding="utf-8"))
    # Exact names: vLLM takes a router for a linear layer like others.
    kept = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(config["num_hidden_layers"]))]
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }
    return {"load_format": "dummy", "hf_overrides": {"quantization_config": quantization}}
