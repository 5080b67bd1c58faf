"""A run against its plan after three steps; the scaling configurations, which the planner must read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from redone_launcher.plan import refitted

from redone.config.load import load_config
from redone.config.schema import Config
from redone.errors import ConfigError
from redone.layout import ModelShape, check_layout
from redone.planner.lengths import moments
from redone.planner.report import Options, describe_job, make_plan
from redone.planner.watch import PlanWatch, read_multiplier

SCALING = Path(__file__).parents[2] / "configs" / "scaling"
LARGE = sorted(p for p in SCALING.glob("*.yaml") if p.name != "tiny.yaml")
HF: dict[str, Any] = dict(
    model_type="qwen3_moe", num_hidden_layers=48, hidden_size=2048, intermediate_size=6144,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
    max_position_embeddings=40960, rope_theta=1e6,
    rms_norm_eps=1e-6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
)  # fmt: skip


def nemo(*overrides: str) -> Config:
    return load_config(SCALING / "nemo_v06.yaml", ["cluster.nodes=4", "rollout.replicas=16", *overrides])


def metrics(seconds: float) -> dict[str, float]:
    return {"timing_s/step": seconds, "prompt_length/mean": 110.0, "response_length/mean": 3208.0}


def told(watch: PlanWatch | None, folder: Path, seconds: list[float]) -> list[str | None]:
    assert watch is not None
    listen = watch.listener(folder)
    return [listen(step, metrics(s)) for step, s in enumerate(seconds)]


def test_three_steps_are_compared_with_the_band(tmp_path: Path) -> None:
    options = Options(nodes=4, gpu="h100", prompt_tokens=110.0, response_tokens=3208.0)
    plan = make_plan(nemo(), HF, options)
    predicted = plan.chosen.seconds.step
    said = told(PlanWatch.of(nemo(), HF), tmp_path, [9.0, *(predicted * x for x in (1.3, 1.1, 1.2)), 9.0])
    assert [bool(s) for s in said] == [False, False, False, True, False]
    assert "inside the plan's" in (said[3] or "") and "1.20" in (said[3] or "")
    multiplier, band = read_multiplier(tmp_path)
    assert multiplier == pytest.approx(1.2) and band < plan.band
    assert f"{predicted * 1.2:.1f} s a step" in refitted(plan, tmp_path)
    cramped = make_plan(nemo("rollout.gpu_memory_utilization=0.5"), HF, options)
    assert "not re-fitted" in refitted(cramped, tmp_path)


def test_a_slow_run_is_outside(tmp_path: Path) -> None:
    said = told(PlanWatch.of(nemo(), HF), tmp_path, [0.0, 5e3, 5e3, 5e3])
    assert "OUTSIDE" in (said[3] or "")
    assert json.loads((tmp_path / "planned.json").read_text())["inside"] is False


def test_memory_above_the_plan_is_said(tmp_path: Path) -> None:
    cfg = nemo("trainer.offload=true")
    options = Options(nodes=4, gpu="h100", prompt_tokens=110.0, response_tokens=3208.0)
    plan = make_plan(cfg, HF, options)
    planned = {m.phase: m.total / 1e9 for m in plan.chosen.memory if m.rank == "trainer"}
    awake = make_plan(nemo(), HF, options)
    assert planned["rollout"] < max(m.total for m in awake.chosen.memory if m.phase == "rollout") / 1e9
    watch = PlanWatch.of(cfg, HF)
    assert watch is not None
    listen = watch.listener(tmp_path)
    used = {"memory/rollout_peak_gb": planned["rollout"] + 1, "memory/update_peak_gb": planned["update"] - 1}
    (said,) = [s for step in (1, 2, 3) if (s := listen(step, {**metrics(300.0), **used}))]
    assert (
        f"rollout {planned['rollout'] + 1:.1f} GB (planned {planned['rollout']:.1f}, ABOVE the plan)" in said
    )
    assert f"update {planned['update'] - 1:.1f} GB (planned {planned['update']:.1f})" in said
    assert "weight update" not in said  # not read
    written = json.loads((tmp_path / "planned.json").read_text())["memory_gb"]
    assert written["rollout"]["measured"] == pytest.approx(planned["rollout"] + 1)


def test_what_cannot_be_predicted_is_said_not_guessed(tmp_path: Path) -> None:
    cramped = nemo("rollout.gpu_memory_utilization=0.5")
    said = told(PlanWatch.of(cramped, HF), tmp_path, [0.0, 1.0, 1.0, 1.0])
    assert "refuses to predict" in (said[3] or "") and not (tmp_path / "planned.json").exists()


def test_no_gpu_no_watch_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    assert PlanWatch.of(nemo("cluster.gpu=null"), HF) is None
    with pytest.raises(ConfigError, match="abacus"):
        PlanWatch.of(nemo("cluster.gpu=abacus"), HF)
    with pytest.raises(ConfigError, match=r"cluster\.gpu"):
        read_multiplier(tmp_path)
    for wrong in (
        "[]",
        "{",
        '{"multiplier": NaN, "band_after": 1.35}',
        '{"multiplier": 0, "band_after": 1.35}',
    ):
        (tmp_path / "planned.json").write_text(wrong)
        with pytest.raises(ConfigError, match=r"no usable planned\.json"):
            read_multiplier(tmp_path)


@pytest.mark.parametrize("path", LARGE, ids=lambda p: p.stem)
@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16, 32])
def test_scaling_configurations_are_legal_on_every_node_count(path: Path, nodes: int) -> None:
    cfg = load_config(path, [f"cluster.nodes={nodes}", f"rollout.replicas={4 * nodes}"])
    shape = ModelShape.from_hf(HF)
    assert check_layout(cfg.trainer.parallel, cfg.cluster.world_size, shape) == []
    job, _ = describe_job(cfg, shape, Options(nodes=nodes, gpu="h100"))
    assert job.layout.train_gpus == 8 * nodes
    a = cfg.algorithm
    assert a.train_batch_size % a.ppo_mini_batch_size == 0
    assert cfg.rollout.n == len(cfg.rollout.forced_lengths) or not cfg.rollout.forced_lengths


def test_the_nemo_workload_is_the_published_one() -> None:
    cfg = nemo()
    job, _ = describe_job(cfg, ModelShape.from_hf(HF), Options(nodes=4, gpu="h100", prompt_tokens=110))
    work = job.work
    assert (work.prompts, work.samples, work.update_sequences, work.updates) == (64, 32, 512, 4)
    assert moments(work.lengths)[0] == pytest.approx(3203, rel=0.01)
    assert work.forward_passes == 2 and (job.layout.expert, job.layout.rollout_tensor) == (8, 2)
    assert cfg.data.max_prompt_length + cfg.data.max_response_length == 4096
