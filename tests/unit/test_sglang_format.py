"""SGLang's requests and answers as plain values, our sampler's draws, rollout.engine's variants."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redone.config.check import check_config
from redone.config.load import config_from_dict
from redone.config.schema import SglangEngine, VllmEngine
from redone.engine import build_engine, engine_env
from redone.engine.draws import draw, restricted, uniform
from redone.engine.sglang_format import (
    CONTEXT_SLACK,
    completion_of,
    request_parameters,
    scores_of,
    sglang_arguments,
)
from redone.errors import ConfigError, EngineError
from redone.types import Sampling, VersionSpan


def config(engine: dict[str, Any], **rollout: Any) -> Any:
    return config_from_dict(
        {
            "model": {"path": "m", "dtype": "float32"},
            "data": {"train": ["t"], "max_prompt_length": 100, "max_response_length": 28},
            "rewards": {"default": {"family": "exact"}},
            "rollout": {"engine": engine, **rollout},
            "evaluate": {"keep_best": False},
            "weights": {"canary": {"length": 8}},
        }
    )


def answer(**meta: Any) -> dict[str, Any]:
    return {
        "output_ids": [7, 8],
        "meta_info": {
            "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None]],
            "finish_reason": {"type": "length"},
            "weight_version": "3",
            **meta,
        },
    }


def test_a_variant_keeps_its_own_options_only() -> None:
    assert isinstance(config({"in_process": True}).rollout.engine, VllmEngine)
    assert isinstance(config({"type": "sglang", "max_total_tokens": 999}).rollout.engine, SglangEngine)
    for engine in ({"type": "sglang", "in_process": True}, {"type": "sglang", "block_size": 32}):
        with pytest.raises(ConfigError, match=r"it exists only for the variants vllm"):
            config(engine)
    with pytest.raises(ConfigError, match=r"max_total_tokens; it exists only for the variants sglang"):
        config({"max_total_tokens": 999})
    with pytest.raises(ConfigError, match=r"rollout.engine.type=tgi; use one of vllm, sglang"):
        config({"type": "tgi"})


def test_the_interpreter_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.engine.python=/nowhere/python: no such interpreter"):
        check_config(config({"type": "sglang", "python": "/nowhere/python"}))
    (tmp_path / "python").touch()
    check_config(config({"type": "sglang", "python": str(tmp_path / "python")}))


def test_an_interpreter_without_the_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of these tests has none."""
    monkeypatch.delitem(sys.modules, "redone.engine.sglang", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(EngineError, match=f"{sys.executable} has no sglang; .* rollout.engine.python"):
        build_engine(config({"type": "sglang"}), 0)


def test_arguments_leave_room_behind_the_context() -> None:
    cpu = sglang_arguments(config({"type": "sglang", "max_num_seqs": 5}), 128)
    assert cpu["context_length"] == 128 + CONTEXT_SLACK and cpu["max_running_requests"] == 5
    assert cpu["device"] == "cpu" and cpu["max_total_tokens"] > cpu["context_length"]
    with pytest.raises(EngineError, match=r"max_total_tokens=130 holds no response of 128 tokens"):
        sglang_arguments(config({"type": "sglang", "max_total_tokens": 130}), 128)
    assert engine_env(config({"type": "sglang"}))["SGLANG_USE_CPU_ENGINE"] == "1"


def test_a_request_names_every_end_token_itself() -> None:
    sampling = Sampling(max_tokens=9, temperature=0.7, top_p=0.9, stop_token_ids=(4, 5))
    parameters = request_parameters(sampling, 3, 2**64 - 1)
    assert parameters["stop_token_ids"] == [4, 5] and parameters["ignore_eos"] is False
    assert parameters["max_new_tokens"] == 3 and parameters["sampling_seed"] == 2**63 - 1
    assert request_parameters(Sampling(max_tokens=9), 9, 0)["ignore_eos"] is True
    with pytest.raises(EngineError, match="use temperature=0"):
        request_parameters(Sampling(max_tokens=9, top_k=1), 9, 0)


def test_an_answer_becomes_a_completion() -> None:
    spans = [{"version": "2", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 2}]
    found = completion_of(answer(weight_versions=spans), 2)
    assert found.token_ids.tolist() == [7, 8] and found.logprobs.tolist() == [-0.5, -1.5]
    assert found.versions == (
        VersionSpan(version=2, start=0, end=1),
        VersionSpan(version=3, start=1, end=2),
    )
    assert completion_of(answer(), 2).versions == (VersionSpan(version=3, start=0, end=2),)
    assert completion_of(answer(finish_reason={"type": "abort"}), 9).finish == "abort"
    with pytest.raises(EngineError, match=r"cut a response at 2 of 3 tokens"):
        completion_of(answer(), 3)
    with pytest.raises(EngineError, match="other tokens"):
        completion_of(answer(output_token_logprobs=[[-0.5, 7, None], [-1.5, 9, None]]), 2)


def test_scores_skip_the_first_token() -> None:
    scored = {"meta_info": {"input_token_logprobs": [[None, 5, None], [-1.0, 6, None]]}}
    assert scores_of(scored, [5, 6]).tolist() == [-1.0]
    with pytest.raises(EngineError, match="scored 2 tokens of a sequence of 3"):
        scores_of(scored, [5, 6, 7])


def test_uniforms_are_splitmix64_and_even() -> None:
    """The first outputs of SplitMix64 for seed 0 are published; a seed is mixed before its position."""
    seeds = torch.zeros(3, dtype=torch.int64)
    assert uniform(seeds, torch.tensor([1, 2, 3])).tolist() == [
        value / 2**53
        for value in (0xE220A8397B1DCDAF >> 11, 0x6E789E6AA1B965F4 >> 11, 0x06C45D188009454F >> 11)
    ]
    many = uniform(torch.arange(100_000) // 100, torch.arange(100_000) % 100)
    assert float(many.min()) >= 0 and float(many.max()) < 1 and len(many.unique()) > 99_990
    counts = torch.histc(many, 20, 0, 1)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 44  # chi-squared, 19 degrees of freedom, 0.1%


def test_draws_follow_the_distribution_and_avoid_what_was_cut() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    full = torch.log_softmax(logits, -1).expand(20_000, -1)
    rows = torch.arange(20_000)
    frequencies = torch.bincount(draw(full, rows, rows * 0 + 3), minlength=5) / 20_000
    assert torch.allclose(frequencies, full[0].exp(), atol=0.015)
    top_k, off = torch.full((20_000,), 2), torch.full((20_000,), 99)
    cut = restricted(full, top_k, torch.ones(20_000))
    assert set(draw(cut, rows, rows).tolist()) == {0, 4}
    assert torch.allclose(cut[0, [0, 4]], torch.log_softmax(logits[[0, 4]], -1))
    nucleus = restricted(full, off, torch.full((20_000,), 0.4))
    assert nucleus[0].isfinite().tolist() == [True, False, False, False, False]
    assert torch.allclose(restricted(full, off, torch.ones(20_000)), full, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(64, 50, generator=generator).log_softmax(-1)
    seeds, positions = torch.arange(64) * 7919, torch.arange(64)
    together = draw(logprobs, seeds, positions)
    alone = [int(draw(logprobs[i : i + 1], seeds[i : i + 1], positions[i : i + 1])) for i in range(64)]
    assert together.tolist() == alone
    assert np.mean(together.numpy() != draw(logprobs, seeds + 1, positions).numpy()) > 0.5
