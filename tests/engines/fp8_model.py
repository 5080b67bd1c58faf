"""`python fp8_model.py FOLDER KIND`: vLLM's own fp8 model on the CPU, loaded with a trainer's tensors.

vLLM's CPU kernels for block-quantised products need AMX; this script takes the choice of a kernel away (no
product is ever computed) and leaves everything else to vLLM: configuration, parameters, loaders. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import vllm.model_executor.layers.quantization.fp8 as fp8
from safetensors.torch import load_file
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.model_loader.utils import initialize_model

from redone.config.load import config_from_dict
from redone.data.tiny import make_tiny_model
from redone.engine.quantized import quantized_arguments
from redone.weights.quantize import quantized_tensors

SIZES = dict(
    hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=384
)


def parts_of(name: str, published: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """What a parameter of vLLM should hold, joined by hand from the tensors of the trainer."""
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for whole, pieces in fused.items():
        if f".{whole}." in name:
            return torch.cat([published[name.replace(whole, piece)].view(torch.uint8) for piece in pieces])
    if "routed_experts" in name:
        layer, last = name.split("routed_experts.")
        which, suffix = last.split("_", 1)
        pieces = ("gate_proj", "up_proj") if which == "w13" else ("down_proj",)
        count = sum(n.startswith(layer) and n.endswith(".down_proj.weight") for n in published)
        one = [
            torch.cat([published[f"{layer}{e}.{piece}.{suffix}"].view(torch.uint8) for piece in pieces])
            for e in range(count)
        ]
        return torch.stack(one)
    found = published.get(name)
    return None if found is None else found.view(torch.uint8)


def main(folder: Path, kind: str) -> dict[str, Any]:
    more = {"moe_intermediate_size": 128} if kind == "qwen3_moe" else {}
    path = make_tiny_model(folder / kind, kind, seed=3, dtype=torch.bfloat16, **SIZES, **more)  # type: ignore[arg-type]
    cfg = config_from_dict(
        {"model": {"path": str(path)}, "data": {"train": ["t"]}, "rewards": {"default": {"family": "exact"}},
         "cluster": {"device": "cuda"}, "weights": {"quantization": "fp8_block"}}
    )  # fmt: skip
    args = EngineArgs(
        model=str(path), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=128, enforce_eager=True,
        block_size=32, **quantized_arguments(cfg),
    )  # fmt: skip
    tensors = load_file(path / "model.safetensors")
    published = {n: t for n, t in quantized_tensors(tensors.items()) if t is not None}
    config = args.create_engine_config()
    with (
        set_current_vllm_config(config),
        mock.patch.object(fp8, "init_fp8_linear_kernel", lambda **_: None),
        mock.patch.object(fp8, "MarlinFP8ScaledMMLinearKernel", type("None_", (), {})),
    ):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous-{kind}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        model = initialize_model(config)
        torch.set_default_dtype(torch.float32)
        loaded = model.load_weights(published.items())
    parameters = {n: p for n, p in model.named_parameters() if ".attn." not in n}  # vLLM's own, not loaded
    expected = {n: parts_of(n, published) for n in parameters}
    differing = [
        n for n, p in parameters.items()
        if expected[n] is None or not torch.equal(p.data.view(torch.uint8), expected[n])  # type: ignore[arg-type]
    ]  # fmt: skip
    return {
        "parameters": len(parameters),
        "not_loaded": sorted(set(parameters) - set(loaded or ())),
        "differing": differing,
        "fp8": sum(p.dtype == torch.float8_e4m3fn for p in parameters.values()),
        "factors": sum(n.endswith("_scale_inv") for n in parameters),
        "routers": sorted({str(p.dtype) for n, p in parameters.items() if n.endswith("mlp.gate.weight")}),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
