"""rollout.engine: which engine writes the responses, and its own options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from redone.config.section import Section


class EngineBase(Section):
    python: str | None = Field(
        None,
        description="Interpreter of the engine processes: /path/venv/bin/python of an environment that holds "
        "this engine, redone, and the same Ray and Python as the trainer's. null: the trainer's.",
    )
    enforce_eager: bool = Field(True, description="No CUDA graphs / torch.compile.")
    max_num_seqs: int = Field(256, ge=1, description="Sequences decoded at once.")
    num_threads: int = Field(1, ge=1, description="CPU threads of the engine.")


class VllmEngine(EngineBase):
    type: Literal["vllm"] = "vllm"
    in_process: bool = Field(False, description="One process instead of AsyncLLM's three (fast tests).")
    block_size: int | None = Field(
        None, ge=8, description="KV block; 32 lets short prompts share prefixes on CPU."
    )
    kv_cache_mb: int | None = Field(None, ge=8, description="KV cache size on CPU.")


class SglangEngine(EngineBase):
    type: Literal["sglang"] = "sglang"
    max_total_tokens: int | None = Field(
        None,
        ge=64,
        description="KV cache size in tokens. null: CUDA: from rollout.gpu_memory_utilization; CPU: 8 times "
        "the context length.",
    )
    attention_backend: str | None = Field(
        None, description="SGLang's --attention-backend. null: CUDA: its own choice; CPU: torch_native."
    )


EngineConfig = Annotated[VllmEngine | SglangEngine, Field(discriminator="type")]
