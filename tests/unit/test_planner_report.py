"""`redone plan` on Qwen3-30B-A3B: phases, the gate, nearest layouts, refusals, and the comparison with real
steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from redone_launcher.main import main
from redone_launcher.plan import plan_command

from redone.config.load import config_from_dict
from redone.config.schema import Config
from redone.errors import ConfigError
from redone.planner.layouts import distance
from redone.planner.report import Options, Plan, compare, gate, make_plan, warnings
from redone.planner.text import render

HF: dict[str, Any] = dict(
    model_type="qwen3_moe", num_hidden_layers=48, hidden_size=2048, intermediate_size=6144,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
    max_position_embeddings=40960, rope_theta=1e6,
    rms_norm_eps=1e-6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
)  # fmt: skip
TREE: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"train": ["x"], "max_prompt_length": 512, "max_response_length": 3584},
    "rewards": {"default": {"family": "exact"}},
    "algorithm": {"train_batch_size": 64, "ppo_mini_batch_size": 16},
    "rollout": {"n": 32, "tensor_model_parallel_size": 2, "gpu_memory_utilization": 0.7},
    "trainer": {"parallel": {"expert": 8}, "max_token_len_per_rank": 16384, "recompute": "full"},
    "cluster": {"device": "cuda", "nodes": 4, "gpus_per_node": 8},
}
LENGTHS = dict(prompt_tokens=110.0, response_tokens=3203.0)


def config(**rollout: Any) -> Config:
    return config_from_dict({**TREE, "rollout": {**TREE["rollout"], **rollout}})


@pytest.fixture(scope="module")
def awake() -> Plan:
    """As redone runs today: the trainer's states stay on the GPU."""
    return make_plan(config(), HF, Options(nodes=4, gpu="h100", **LENGTHS))


@pytest.fixture(scope="module")
def asleep() -> Plan:
    return make_plan(config(), HF, Options(nodes=4, gpu="h100", trainer_sleeps=True, **LENGTHS))


def test_every_phase_of_every_rank_is_accounted(asleep: Plan) -> None:
    phases = {p.phase for p in asleep.chosen.memory}
    assert phases >= {"rollout", "wake", "log-probabilities", "update", "weight update", "save"}
    assert any(p.rank == "node RAM" for p in asleep.chosen.memory)
    assert all(p.total == pytest.approx(sum(size for _, size in p.parts)) for p in asleep.chosen.memory)
    host = next(p for p in asleep.chosen.memory if p.rank == "node RAM")
    # 8 ranks' bf16 weights and fp32 gradients, a quarter of the optimizer, the channel, 16 processes
    local = 1_543_714_304 + 28_991_029_248 / 8
    # and, twice, 48 x 8 int16 expert choices per token
    work = asleep.chosen.job.work
    tokens = work.prompts * (work.prompt_tokens + work.samples * sum(work.lengths) / len(work.lengths))
    assert dict(host.parts)["expert choices of a step"] == pytest.approx(2 * 768 * tokens)
    states = 48 * local + 12 * 30.53e9 / 4
    assert host.total == pytest.approx(states + 61.1e9 + 48e9 + 2 * 768 * tokens, rel=0.03)


def test_the_gate_blocks_on_memory_and_names_what_fits(awake: Plan) -> None:
    problems = gate(awake)
    assert problems and "rollout" in problems[0] and "GB of 85.5 GB" in problems[0]
    assert "nearest layouts that fit" in problems[-1]
    assert awake.near and all(x.fits for x in awake.near)
    distances = [distance(x.job.layout, awake.chosen.job.layout) for x in awake.near]
    assert distances == sorted(distances) and distances[0] > 0


def test_the_gate_passes_what_fits_however_slow(asleep: Plan) -> None:
    assert gate(asleep) == []
    assert asleep.best and asleep.best[0].seconds.step <= asleep.chosen.seconds.step
    steps = [x.seconds.step for x in asleep.best]
    assert len(steps) == 3 and steps == sorted(steps)


def test_the_nemo_workload_is_near_its_published_192_seconds(asleep: Plan) -> None:
    step, rate = asleep.chosen.seconds.step, asleep.tokens / asleep.chosen.seconds.step / 32
    assert step / asleep.band < 192 < step * asleep.band
    assert rate / asleep.band < 1102 < rate * asleep.band
    s = asleep.chosen.seconds
    assert s.step == pytest.approx(s.rollout + s.logprobs + s.update + s.sync + s.fixed)
    assert 0 < asleep.step_mfu < asleep.update_mfu < 0.5


def test_a_tight_cache_is_refused_with_its_sensitivity() -> None:
    tight = make_plan(
        config(gpu_memory_utilization=0.58), HF, Options(nodes=4, gpu="h100", trainer_sleeps=True, **LENGTHS)
    )
    assert "KV cache" in tight.refused[0]
    steps = [seconds for _, seconds in tight.sensitivity]
    assert steps == sorted(steps, reverse=True) and steps[0] > 1.05 * steps[-1]
    text = render(tight)
    assert "not predicted" in text and "sensitivity" in text and "tokens/s/GPU" not in text
    assert not any("KV cache" in problem for problem in gate(tight))
    assert any("KV cache" in warning for warning in warnings(tight))


def test_text_says_predicted_and_what_was_assumed(asleep: Plan) -> None:
    text = render(asleep)
    assert "predicted, not measured" in text and "P10-P90" in text and "MFU" in text and "assumed" in text
    for phase in ("rollout", "log-probabilities", "update", "weight update", "fixed"):
        assert phase in text


def test_asynchronous_ranks_are_apart() -> None:
    plan = make_plan(config(), HF, Options(nodes=4, gpu="h100", rollout_nodes=2, **LENGTHS))
    assert {p.rank for p in plan.chosen.memory} == {"trainer", "engine", "node RAM"}
    s = plan.chosen.seconds
    assert max(s.rollout, s.update) < s.step < s.rollout + s.update + s.logprobs + s.sync + s.fixed


def test_real_steps_refit_one_multiplier(asleep: Plan) -> None:
    step = asleep.chosen.seconds.step
    good = compare(asleep, [1.1 * step, 1.2 * step, 1.3 * step])
    assert good.inside and good.multiplier == pytest.approx(1.2) and good.band < asleep.band
    assert not compare(asleep, [2 * step] * 4).inside
    with pytest.raises(ConfigError, match="3 or more"):
        compare(asleep, [step, step])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(nodes=4, gpu="b300"), "use one of"),
        (Options(nodes=4, gpu="h100", rollout_nodes=4), "--rollout-nodes 4"),
        (Options(nodes=4, gpu="h100", response_tokens=5000.0), "outside 1 .. 3584"),
        (Options(nodes=4, gpu="h100", lengths_file="no-such-file"), "--lengths no-such-file"),
        (Options(nodes=0, gpu="h100"), "--nodes 0"),
        (Options(nodes=4, gpu="h100", response_tokens=math.nan), "outside 1 .. 3584"),
        (Options(nodes=4, gpu="h100", prompt_tokens=math.nan), "--prompt-tokens nan"),
        (Options(nodes=4, gpu="h100", prompt_tokens=-5.0), "outside 1 .. 512"),
        (Options(nodes=4, gpu="h100", prompt_tokens=513.0), "data.max_prompt_length"),
        (Options(nodes=4, gpu="h100", sigma=0.0), "--sigma 0"),
        (Options(nodes=4, gpu="h100", sigma=math.inf), "--sigma inf"),
        (Options(nodes=4, gpu="h100", host_memory=-1.0), "--host-memory -1"),
        (Options(nodes=4, gpu="h100", host_memory=2000.0), "give bytes"),
    ],
)
def test_bad_options_are_named(options: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(config(), HF, options)


def test_context_parallelism_on_packed_rows_is_refused() -> None:
    tree = {**TREE, "trainer": {**TREE["trainer"], "parallel": {"expert": 8, "context": 2}}}
    options = Options(nodes=4, gpu="h100", trainer_sleeps=True, **LENGTHS)
    plan = make_plan(config_from_dict(tree), HF, options)
    assert "context parallelism on packed rows" in plan.refused[0]
    text = render(plan)
    assert "not predicted" in text and "tokens/s/GPU" not in text
    assert "trainer 5 x as slow" in text and "of GPU memory for the engine:" not in text
    seconds, (low, _, high) = plan.chosen.seconds, (step for _, step in plan.sensitivity)
    assert low == seconds.step and high == pytest.approx(low + 8 * (seconds.logprobs + seconds.update))


def test_forced_lengths_win_and_the_plan_says_so() -> None:
    plan = make_plan(config(forced_lengths=[100, 200]), HF, Options(nodes=4, gpu="h100", **LENGTHS))
    assert plan.chosen.job.work.lengths == (100.0, 200.0)
    assert any("rollout.forced_lengths" in text for text in plan.assumed)


def test_help_says_what_it_is_for_and_what_the_exit_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and "Exit code: 0 go, 1 memory does not fit" in text
    assert "Starts nothing" in text and "redone plan configs/scaling/nemo_v06.yaml" in text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**HF, "num_hidden_layers": 4}))
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**TREE, "model": {"path": str(tmp_path)}}))
    assert plan_command(file, ["rollout.gpu_memory_utilization=0.5"], Options(nodes=1, gpu="h100")) == 0
    assert "4 x" not in capsys.readouterr().out.splitlines()[0]
    assert plan_command(file, ["rollout.gpu_memory_utilization=1.0"], Options(nodes=1, gpu="h100")) == 1
    assert "blocks" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="planning needs"):
        plan_command(file, [f"model.path={tmp_path}/none"], Options(nodes=1, gpu="h100"))
