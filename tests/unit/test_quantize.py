"""Block-quantised weights: values, bounds, names; against a straight implementation, block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redone.config.check import check_config
from redone.config.load import config_from_dict
from redone.engine.quantized import quantized_arguments
from redone.errors import ConfigError
from redone.weights.plan import make_plan
from redone.weights.quantize import (
    blocks,
    dequantize,
    is_quantized,
    quantize,
    quantized_metas,
    quantized_tensors,
)

SHAPES = [(128, 128), (256, 384), (130, 257), (1, 1), (127, 129), (300, 64)]
VALUES: dict[str, Any] = {
    "model": {"path": "m"}, "data": {"train": ["t"]}, "rewards": {"default": {"family": "exact"}},
    "cluster": {"device": "cuda"}, "weights": {"quantization": "fp8_block"},
}  # fmt: skip
LAYER = "model.layers.3."
KEPT = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", f"{LAYER}input_layernorm.weight",
        f"{LAYER}self_attn.q_norm.weight", f"{LAYER}mlp.gate.weight")  # fmt: skip
CHANGED = (f"{LAYER}self_attn.q_proj.weight", f"{LAYER}self_attn.o_proj.weight",
           f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.experts.17.down_proj.weight")  # fmt: skip


def straight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One block after another, from the definition."""
    high, wide = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    factors = torch.empty(high, wide)
    for i in range(high):
        for j in range(wide):
            block = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].float()
            most = float(block.abs().max())
            factors[i, j] = torch.tensor(most) / 448.0 if most else 1.0
            values[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] = (block / factors[i, j]).to(
                values.dtype
            )
    return values, factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_error_bounds(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    scales = torch.logspace(-6, 3, shape[0])[:, None]  # blocks of very different size
    weight = (torch.randn(shape, generator=generator) * scales).to(dtype)
    values, factors = quantize(weight)
    assert values.dtype == torch.float8_e4m3fn and values.shape == shape and factors.shape == blocks(shape)
    expected, expected_factors = straight(weight)
    assert torch.equal(factors, expected_factors)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    error = (dequantize(values, factors) - weight.float()).abs()
    spread = factors.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    # 3 bits of mantissa; below 2^-6 the steps are 2^-9 wide
    bound = torch.maximum(weight.float().abs() / 16, spread * 2.0**-10)
    assert bool((error <= bound * 1.00001).all())
    assert values.float().abs().max() == 448


def test_zeros_and_extremes() -> None:
    weight = torch.zeros(256, 128)
    weight[128:] = torch.finfo(torch.bfloat16).max
    values, factors = quantize(weight)
    assert factors[0, 0] == 1 and not values[:128].float().any()
    back = dequantize(values, factors)
    assert bool(torch.isfinite(back).all()) and torch.allclose(back, weight, rtol=1e-6)


def test_what_is_quantized_and_how_it_is_called() -> None:
    assert not any(map(is_quantized, KEPT)) and all(map(is_quantized, CHANGED))
    metas = [(name, "bfloat16", (256, 130)) for name in (*KEPT, *CHANGED)]
    plan = make_plan(list(quantized_metas(metas)), 10_000)
    found = {t.name: (t.dtype, t.shape, t.nbytes) for t in plan.tensors}
    assert {found[name][0] for name in KEPT} == {"bfloat16"}
    for name in CHANGED:
        assert found[name] == ("float8_e4m3fn", (256, 130), 256 * 130)
        assert found[name + "_scale_inv"] == ("float32", (2, 2), 16)
    assert len(found) == len(KEPT) + 2 * len(CHANGED)


def test_the_stream_follows_the_plan_on_every_rank() -> None:
    tensors = {name: torch.randn(256, 130).bfloat16() for name in (*KEPT, *CHANGED)}
    metas = list(quantized_metas((name, "bfloat16", tuple(t.shape)) for name, t in tensors.items()))
    mine = list(quantized_tensors(tensors.items()))
    others = list(quantized_tensors((name, None) for name in tensors))
    assert [name for name, _ in mine] == [name for name, _ in others] == [name for name, _, _ in metas]
    assert all(t is None for _, t in others)
    for (_, tensor), (_, dtype, shape) in zip(mine, metas, strict=True):
        assert tensor is not None
        assert str(tensor.dtype) == f"torch.{dtype}" and tuple(tensor.shape) == shape


def test_the_engine_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    cfg = config_from_dict({**VALUES, "model": {"path": str(tmp_path)}})
    told = quantized_arguments(cfg)
    assert told["load_format"] == "dummy"
    quantization = told["hf_overrides"]["quantization_config"]
    assert quantization["weight_block_size"] == [128, 128]
    assert quantization["modules_to_not_convert"] == [
        "lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate",
    ]  # fmt: skip
    assert quantized_arguments(config_from_dict({**VALUES, "weights": {}})) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster": {"device": "cpu"}}, "weights.quantization=fp8_block needs cluster.device=cuda"),
        ({"rollout": {"engine": {"type": "sglang"}}}, "with rollout.engine.type=sglang; use vllm"),
        ({"model": {"path": "m", "dtype": "float32"}}, "needs model.dtype=bfloat16"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config_from_dict({**VALUES, **change}), None, "generate")
