"""The tensors of weights.quantization=fp8_block are those of vLLM's fp8 models, and land in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fp8_model.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_vllm_takes_every_published_tensor(tmp_path: Path, kind: str) -> None:
    """Bit for bit, fused and per expert, weights and factors; routers and head stay bf16."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["not_loaded"] == [] and found["differing"] == []
    assert found["fp8"] == found["factors"] == 4 * 4  # qkv, o, and two of the MLP, in four layers
    assert found["routers"] == (["torch.bfloat16"] if kind == "qwen3_moe" else [])
