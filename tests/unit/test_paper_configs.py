"""The paper's numbers (arXiv 2511.07070 v1, sections 3 and 4.1) stand in the shipped configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redone.config.check import check_config
from redone.config.load import load_config
from redone.config.nodes import stage_config
from redone.config.pipeline import HardSetNode, MixNode, SftSetNode, SoftLabelNode
from redone.config.schema import Config, DapoLoss

ROOT = Path(__file__).parents[2]
DENSE: dict[str, Any] = {
    "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728,
    "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
    "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
MOE: dict[str, Any] = {
    **DENSE, "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048,
    "intermediate_size": 6144, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(params=[("qwen3_4b", DENSE), ("qwen3_30b_a3b", MOE)], ids=["4b", "30b"])
def shipped(request: pytest.FixtureRequest) -> tuple[Config, dict[str, Any]]:
    name, model = request.param
    return load_config(ROOT / "configs" / name / "pipeline.yaml"), model


def test_it_is_legal_on_the_models_shape(shipped: tuple[Config, dict[str, Any]]) -> None:
    cfg, model = shipped
    assert cfg.kind == "pipeline"
    assert check_config(cfg, model) == ()


def test_stages_one_and_three(shipped: tuple[Config, dict[str, Any]]) -> None:
    cfg, _ = shipped
    for node in ("explore", "refine"):
        stage = stage_config(cfg, node)
        a, o = stage.algorithm, stage.trainer.optim
        assert (a.train_batch_size, stage.rollout.n, a.ppo_mini_batch_size) == (1024, 16, 256)
        assert (stage.data.max_prompt_length, stage.data.max_response_length) == (10_000, 8_192)
        assert (a.overlong_buffer.enable, a.overlong_buffer.len, a.overlong_buffer.penalty_factor) == (
            True,
            4096,
            1.0,
        )
        assert isinstance(a.loss, DapoLoss) and (a.loss.clip_ratio_low, a.loss.clip_ratio_high) == (0.2, 0.28)
        assert (o.lr, o.lr_decay_style, o.lr_warmup_steps, o.weight_decay) == (5e-6, "constant", 10, 0.1)
        assert (a.total_steps, a.kl.coef, a.entropy_coeff, a.filter_groups.enable) == (500, 0.0, 0.0, True)
    explore = cfg.pipeline.nodes["explore_data"]
    assert isinstance(explore, MixNode) and explore.total == 800_000
    assert {d: round(s * explore.total) for d, s in explore.shares.items()} == {
        "sns": 750_000,
        "general": 50_000,
    }
    hard = cfg.pipeline.nodes["refine_data"]
    assert isinstance(hard, HardSetNode) and (hard.draw.total, hard.draw.rationale_share) == (400_000, 0.5718)


def test_stage_two(shipped: tuple[Config, dict[str, Any]]) -> None:
    cfg, _ = shipped
    for node in ("target", "sft_only"):
        stage = stage_config(cfg, node)
        o, s = stage.trainer.optim, stage.sft
        assert (s.epochs, s.batch_size, s.max_length) == (2, 64, 16_384)
        assert (o.lr, o.lr_decay_style, o.lr_warmup_ratio, o.lr_warmup_steps) == (5e-6, "cosine", 0.1, 0)
    failures, labels = cfg.pipeline.nodes["sft_set"], cfg.pipeline.nodes["soft_labels"]
    assert isinstance(failures, SftSetNode) and failures.size == 1_700_000
    assert isinstance(labels, SoftLabelNode) and (labels.candidates, labels.model) == (8, "explore")
    prompts = cfg.pipeline.nodes["general_prompts"]
    assert isinstance(prompts, MixNode) and prompts.total == 100_000


def test_the_ablation_is_table_three(shipped: tuple[Config, dict[str, Any]]) -> None:
    cfg, _ = shipped
    assert list(cfg.pipeline.ablation) == ["base", "SFT only", "SFT -> RL", "EL", "EL + TFT", "EL + TFT + RL"]
    assert set(cfg.pipeline.table.values()) <= set(cfg.pipeline.ablation.values())
    assert "sft_only" not in cfg.pipeline.targets
