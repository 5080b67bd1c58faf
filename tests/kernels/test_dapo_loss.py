"""dapo_loss: value, gradient and metrics against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from redone_kernels import launch, reference
from redone_kernels.dapo_loss import METRICS, NUM_SUMS, DapoConfig, combine_metrics, dapo_loss

from tests.kernels.cases import CONFIGS, FULL, doubled, relative, tokens

COUNTS = ["tokens", "clip_high", "clip_low", "dual_clip", "tis_capped", "nonfinite"]


def check(n: int, cfg: DapoConfig, device: torch.device, seed: int = 0) -> None:
    arguments = tokens(n, device, seed=seed)
    exact = doubled(arguments)
    for leaf in (arguments["logprob"], arguments["entropy"], exact["logprob"], exact["entropy"]):
        leaf.requires_grad_()
    out = dapo_loss(**arguments, denom=77.0, cfg=cfg)
    loss, metrics, _ = reference.dapo_loss(**exact, denom=77.0, cfg=cfg)
    scale = max(abs(float(loss)), float(metrics[METRICS.index("grad_abs")]) / 77.0, 1e-6)
    assert abs(float(out.loss) - float(loss)) <= 1e-6 * scale
    out.loss.backward()
    loss.backward()
    assert relative(arguments["logprob"].grad, exact["logprob"].grad) <= 1e-6
    assert relative(arguments["entropy"].grad, exact["entropy"].grad) <= 1e-6
    assert not arguments["logprob"].grad[~arguments["mask"]].any()
    for i, name in enumerate(METRICS):
        got, want = float(out.metrics[i]), float(metrics[i])
        if name in COUNTS:
            assert got == want, name
        else:
            assert abs(got - want) <= 2e-6 * max(abs(want), n**0.5, 1.0), name


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_fp64(name: str, device: torch.device) -> None:
    check(1500, CONFIGS[name], device)


@pytest.mark.parametrize("n", [1, 15, 1024, 1025])
def test_sizes(n: int, device: torch.device) -> None:
    check(n, FULL, device)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 50))
def test_fuzz(first: int, device: torch.device) -> None:
    configs = list(CONFIGS.values())
    for seed in range(first, first + 50):
        check(1 + seed * 7 % 300, configs[seed % len(configs)], device, seed)


def test_repeats_to_the_bit(device: torch.device) -> None:
    arguments = tokens(3000, device)
    runs = [dapo_loss(**arguments, denom=9.0, cfg=FULL) for _ in range(2)]
    assert torch.equal(runs[0].loss, runs[1].loss) and torch.equal(runs[0].metrics, runs[1].metrics)


def rows(device: torch.device, log_ratio: list[float], advantage: list[float]) -> dict[str, torch.Tensor]:
    n = len(log_ratio)
    return {
        "logprob": torch.tensor(log_ratio, device=device).requires_grad_(),
        "old_logprob": torch.zeros(n, device=device),
        "advantage": torch.tensor(advantage, device=device),
        "mask": torch.ones(n, dtype=torch.bool, device=device),
    }


def test_clip_high_is_higher(device: torch.device) -> None:
    """Ratios 1.25 and 0.75: inside the upper bound 1.28, outside the lower bound 0.8."""
    arguments = rows(device, [0.2231436, -0.2876821], [1.0, -1.0])
    out = dapo_loss(**arguments, denom=1.0, cfg=DapoConfig())
    assert torch.allclose(out.loss, torch.tensor(-1.25 + 0.8, device=device))
    out.loss.backward()
    assert torch.allclose(arguments["logprob"].grad, torch.tensor([-1.25, 0.0], device=device))
    assert out.metrics[METRICS.index("clip_high")] == 0 and out.metrics[METRICS.index("clip_low")] == 1


def test_dual_clip_bounds_negative_advantages_only(device: torch.device) -> None:
    arguments = rows(device, [2.0, 2.0], [-1.0, 1.0])
    out = dapo_loss(**arguments, denom=1.0, cfg=DapoConfig(dual_clip=3.0))
    assert torch.allclose(out.loss, torch.tensor(3.0 - 1.28, device=device))
    out.loss.backward()
    assert not arguments["logprob"].grad.any()
    assert out.metrics[METRICS.index("dual_clip")] == 1


def test_on_policy_ratio_is_exactly_one(device: torch.device) -> None:
    arguments = tokens(200, device)
    arguments["old_logprob"] = arguments["logprob"].clone()
    out = dapo_loss(**arguments, denom=1.0, cfg=DapoConfig())
    assert out.metrics[METRICS.index("ratio_max")] == 1
    assert out.metrics[METRICS.index("ratio")] == arguments["mask"].sum()
    assert out.metrics[METRICS.index("k1_old")] == 0


def test_zero_advantage_and_far_ratios(device: torch.device) -> None:
    """Log-ratios beyond the exponent's clamp stay finite and pass no gradient; A = 0 costs nothing."""
    arguments = rows(device, [0.5, -30.0, 30.0], [0.0, -1.0, -1.0])
    out = dapo_loss(**arguments, denom=1.0, cfg=DapoConfig(clip_low=0.99))
    out.loss.backward()
    assert torch.isfinite(out.metrics).all() and not arguments["logprob"].grad.any()


def test_nothing_selected(device: torch.device) -> None:
    arguments = tokens(40, device)
    arguments["mask"][:] = False
    arguments["logprob"] = torch.full_like(arguments["logprob"], torch.nan).requires_grad_()
    out = dapo_loss(**arguments, denom=3.0, cfg=FULL)
    out.loss.backward()
    assert float(out.loss) == 0 and not out.metrics.any() and not arguments["logprob"].grad.any()


def test_nan_in_a_live_row_shows(device: torch.device) -> None:
    arguments = tokens(300, device)
    live = int(arguments["mask"].nonzero()[7])
    arguments["old_logprob"][live] = torch.nan
    out = dapo_loss(**arguments, denom=1.0, cfg=FULL)
    assert torch.isnan(out.loss) and out.metrics[METRICS.index("nonfinite")] == 1


def test_no_rows(device: torch.device) -> None:
    out = dapo_loss(**tokens(0, device), denom=1.0, cfg=FULL)
    assert float(out.loss) == 0 and not out.metrics.any()


def test_metrics_of_a_cut_batch_combine(device: torch.device) -> None:
    arguments = tokens(600, device)
    whole = dapo_loss(**arguments, denom=5.0, cfg=FULL)
    parts = [
        dapo_loss(**{k: v[rows] for k, v in arguments.items()}, denom=5.0, cfg=FULL)
        for rows in (slice(0, 100), slice(100, 600))
    ]
    combined = combine_metrics(torch.stack([p.metrics for p in parts]))
    assert torch.allclose(combined, whole.metrics, rtol=1e-5, atol=1e-4)
    assert torch.equal(combined[NUM_SUMS:], whole.metrics[NUM_SUMS:])
    assert torch.allclose(parts[0].loss + parts[1].loss, whole.loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"denom": 0.0}, "denom"),
        ({"cfg": DapoConfig(tis_cap=2.0), "rollout_logprob": None}, "rollout_logprob"),
        ({"cfg": DapoConfig(kl_beta=0.1), "ref_logprob": None}, "ref_logprob"),
        ({"cfg": DapoConfig(ent_coef=0.1), "entropy": None}, "entropy"),
        ({"advantage": torch.zeros(3)}, "advantage"),
    ],
)
def test_says_what_is_missing(change: dict[str, object], word: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=word):
        dapo_loss(**(tokens(20, device) | {"denom": 1.0, "cfg": DapoConfig()} | change))  # type: ignore[arg-type]


def test_this_is_the_kernel(device: torch.device) -> None:
    assert launch.runs_triton(torch.zeros(1, device=device))
