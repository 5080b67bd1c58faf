"""Losses against straight-line implementations of the formulas (loops over tokens, own autograd in fp64)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from redone.algo.loss import LossInputs, policy_loss, with_effective_sample_size
from redone.config.schema import (
    AlgorithmConfig,
    CispoLoss,
    DapoLoss,
    DrGrpoLoss,
    GrpoLoss,
    GspoLoss,
    ImportanceConfig,
    KlConfig,
    SftLoss,
)

LOSSES = [
    DapoLoss(),
    DapoLoss(clip_ratio_c=3.0),
    GrpoLoss(),
    GrpoLoss(clip_ratio_c=1.5),
    DrGrpoLoss(length=7),
    GspoLoss(clip_ratio_low=0.1, clip_ratio_high=0.2),
    CispoLoss(),
    SftLoss(),
]
IDS = [f"{loss.type}-{i}" for i, loss in enumerate(LOSSES)]


def make_inputs(seed: int = 0, lengths: tuple[int, ...] = (5, 1, 8, 3), spread: float = 0.5) -> LossInputs:
    """Sequence 1's only token and a few others are masked; ratios fall on both sides of every clip range."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logprobs = -torch.rand(n, generator=g, dtype=torch.float64) * 3 - 0.1

    def near(scale: float) -> torch.Tensor:
        return logprobs + scale * torch.randn(n, generator=g, dtype=torch.float64)

    ids = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    mask = torch.rand(n, generator=g) > 0.2
    mask[ids == 1] = False
    mask[0] = True
    old, engine, ref = near(spread), near(spread), near(spread)
    return LossInputs(
        logprobs=logprobs.clone().requires_grad_(),
        entropy=torch.rand(n, generator=g, dtype=torch.float64).requires_grad_(),
        old_logprobs=old,
        engine_logprobs=engine,
        ref_logprobs=ref,
        advantages=torch.randn(len(lengths), generator=g, dtype=torch.float64)[ids],
        loss_mask=mask,
        sequence_ids=ids,
    )


def rows_of(inputs: LossInputs) -> dict[int, list[int]]:
    """Loss rows of each sequence that has any."""
    rows: dict[int, list[int]] = {}
    for j, s in enumerate(inputs.sequence_ids.tolist()):
        if inputs.loss_mask[j]:
            rows.setdefault(s, []).append(j)
    return rows


def token_term(inputs: LossInputs, loss, j: int, rows: list[int]) -> torch.Tensor:
    """The policy-gradient term of token j, written with scalars and branches."""
    lp, a = inputs.logprobs[j], inputs.advantages[j]
    if loss.type == "sft":
        return -lp
    ratio = torch.exp(lp - inputs.old_logprobs[j])
    low, high = 1 - loss.clip_ratio_low, 1 + loss.clip_ratio_high
    if loss.type == "cispo":
        return -min(max(ratio.item(), low), high) * a * lp
    if loss.type == "gspo":
        mean = sum((inputs.logprobs[k] - inputs.old_logprobs[k]).item() for k in rows) / len(rows)
        ratio = math.exp(mean) * torch.exp(lp - lp.detach())
    if a >= 0:
        return -a * ratio if ratio.item() < high else -a * high
    term = -a * ratio if ratio.item() > low else -a * low
    cap = getattr(loss, "clip_ratio_c", None)
    return -a * cap if cap is not None and ratio.item() > cap else term


def weight_of(inputs: LossInputs, importance: ImportanceConfig, j: int, rows: list[int]) -> float:
    if importance.level == "off":
        return 1.0
    over = [j] if importance.level == "token" else rows
    w = math.exp(sum((inputs.old_logprobs[k] - inputs.engine_logprobs[k]).item() for k in over))
    if importance.mode == "truncate":
        return min(w, importance.cap)
    return w if w <= importance.cap else 0.0


def kl_term(inputs: LossInputs, estimator: str, j: int) -> torch.Tensor:
    x = inputs.ref_logprobs[j] - inputs.logprobs[j]
    return {"k1": -x, "k2": x * x / 2, "k3": torch.exp(x) - x - 1}[estimator]


def reference_loss(inputs: LossInputs, algorithm: AlgorithmConfig) -> torch.Tensor:
    loss, rows = algorithm.loss, rows_of(inputs)
    tokens = sum(len(r) for r in rows.values())
    total = torch.zeros((), dtype=torch.float64)
    for members in rows.values():
        scale = {
            "dapo": 1 / tokens,
            "cispo": 1 / tokens,
            "sft": 1 / tokens,
            "dr_grpo": 1 / (getattr(loss, "length", 1) * len(rows)),
        }.get(loss.type, 1 / (len(members) * len(rows)))
        for j in members:
            pg = token_term(inputs, loss, j, members)
            if loss.type != "sft":
                pg = pg * weight_of(inputs, algorithm.importance, j, members)
            kl = algorithm.kl.coef * kl_term(inputs, algorithm.kl.estimator, j)
            total = total + scale * (pg + kl - algorithm.entropy_coeff * inputs.entropy[j])
    return total


def denominators(inputs: LossInputs) -> tuple[int, int]:
    rows = rows_of(inputs)
    return sum(len(r) for r in rows.values()), len(rows)


def fresh(inputs: LossInputs) -> LossInputs:
    return dataclasses.replace(
        inputs,
        logprobs=inputs.logprobs.detach().clone().requires_grad_(),
        entropy=inputs.entropy.detach().clone().requires_grad_(),
    )


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
@pytest.mark.parametrize("level", ["off", "token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_value_and_gradient_match_the_formula(loss, level, mode):
    algorithm = AlgorithmConfig(
        loss=loss, importance=ImportanceConfig(level=level, mode=mode, cap=1.2), entropy_coeff=0.01
    )
    for seed in range(4):
        ours = make_inputs(seed)
        theirs = fresh(ours)
        out = policy_loss(ours, algorithm, *denominators(ours))
        out.loss.backward()
        expected = reference_loss(theirs, algorithm)
        expected.backward()
        torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.logprobs.grad, theirs.logprobs.grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.entropy.grad, theirs.entropy.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("loss", [DapoLoss(), GrpoLoss()], ids=["dapo", "grpo"])
def test_kl_term(estimator, loss):
    algorithm = AlgorithmConfig(loss=loss, kl=KlConfig(coef=0.3, estimator=estimator))
    ours = make_inputs(3)
    theirs = fresh(ours)
    out = policy_loss(ours, algorithm, *denominators(ours))
    out.loss.backward()
    expected = reference_loss(theirs, algorithm)
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(ours.logprobs.grad, theirs.logprobs.grad)
    assert (out.loss - out.sums["actor/pg_loss"]).item() == pytest.approx(
        0.3 * out.sums["actor/kl_loss"].item()
    )


def test_k3_is_clamped_as_in_verl():
    inputs = make_inputs()
    inputs = dataclasses.replace(inputs, ref_logprobs=inputs.logprobs.detach() + 100.0)
    algorithm = AlgorithmConfig(kl=KlConfig(coef=1.0))
    out = policy_loss(inputs, algorithm, *denominators(inputs))
    assert out.sums["actor/kl_loss"].item() == pytest.approx(10.0)


def test_the_four_clip_cases_of_dapo():
    """A > 0: the ratio stops counting above 1.28, not below 0.8; A < 0: below 0.8, not above 1.28."""
    ratio = torch.tensor([2.0, 0.5, 2.0, 0.5], dtype=torch.float64)
    lp = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logprobs=lp,
        entropy=None,
        old_logprobs=-ratio.log(),
        engine_logprobs=-ratio.log(),
        ref_logprobs=None,
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64),
        loss_mask=torch.ones(4, dtype=torch.bool),
        sequence_ids=torch.arange(4),
    )
    out = policy_loss(inputs, AlgorithmConfig(), 4, 4)
    out.loss.backward()
    assert out.loss.item() == pytest.approx((-1.28 - 0.5 + 2.0 + 0.8) / 4)
    assert lp.grad.tolist() == pytest.approx([0.0, -0.125, 0.5, 0.0])
    assert out.sums["actor/pg_clipfrac"].item() == pytest.approx(0.5)
    assert out.maxima["actor/ratio_max"].item() == pytest.approx(2.0)
    dual = policy_loss(inputs, AlgorithmConfig(loss=DapoLoss(clip_ratio_c=1.5)), 4, 4)
    assert dual.loss.item() == pytest.approx((-1.28 - 0.5 + 1.5 + 0.8) / 4)
    assert dual.sums["actor/pg_clipfrac_lower"].item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    "loss", [loss for loss in LOSSES if loss.type != "cispo"], ids=lambda loss: loss.type
)
def test_gradcheck(loss):
    """All but cispo, whose stop-gradient weight makes the derivative another one by design."""
    inputs = make_inputs(1)
    algorithm = AlgorithmConfig(loss=loss, kl=KlConfig(coef=0.1), entropy_coeff=0.02)

    def value(lp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        replaced = dataclasses.replace(inputs, logprobs=lp, entropy=entropy)
        return policy_loss(replaced, algorithm, *denominators(inputs)).loss

    assert torch.autograd.gradcheck(value, (inputs.logprobs, inputs.entropy))


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_masked_rows_never_leak(loss):
    algorithm = AlgorithmConfig(
        loss=loss, kl=KlConfig(coef=0.1), entropy_coeff=0.01, importance=ImportanceConfig(level="sequence")
    )
    clean = make_inputs(2)
    bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64).repeat(len(clean.logprobs))

    def poison(values: torch.Tensor) -> torch.Tensor:
        return torch.where(clean.loss_mask, values.detach(), bad[: len(values)])

    dirty = dataclasses.replace(
        clean,
        logprobs=poison(clean.logprobs).requires_grad_(),
        entropy=poison(clean.entropy).requires_grad_(),
        old_logprobs=poison(clean.old_logprobs),
        engine_logprobs=poison(clean.engine_logprobs),
        ref_logprobs=poison(clean.ref_logprobs),
        advantages=poison(clean.advantages),
    )
    a = policy_loss(clean, algorithm, *denominators(clean))
    b = policy_loss(dirty, algorithm, *denominators(clean))
    a.loss.backward()
    b.loss.backward()
    assert a.loss.item() == b.loss.item()
    assert torch.equal(clean.logprobs.grad, dirty.logprobs.grad)
    assert torch.equal(clean.entropy.grad, dirty.entropy.grad)
    for left, right in ((a.sums, b.sums), (a.maxima, b.maxima)):
        assert {k: v.item() for k, v in left.items()} == {k: v.item() for k, v in right.items()}


def cut(inputs: LossInputs, sequences: list[int]) -> LossInputs:
    rows = torch.tensor(
        [j for s in sequences for j in (inputs.sequence_ids == s).nonzero().flatten().tolist()]
    )
    values = {}
    for field in dataclasses.fields(inputs):
        values[field.name] = getattr(inputs, field.name).detach()[rows]
    _, values["sequence_ids"] = torch.unique(values["sequence_ids"], return_inverse=True)
    values["logprobs"].requires_grad_()
    return LossInputs(**values)


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_the_cut_does_not_matter(loss):
    algorithm = AlgorithmConfig(
        loss=loss, kl=KlConfig(coef=0.1), importance=ImportanceConfig(level="sequence")
    )
    whole = make_inputs(5)
    over = denominators(whole)
    expected = policy_loss(whole, algorithm, *over)
    for cuts in ([[0, 1], [2, 3]], [[3], [0, 2], [1]], [[2], [1, 3, 0], []]):
        parts = [policy_loss(cut(whole, c), algorithm, *over) for c in cuts if c]
        parts.append(policy_loss(empty_inputs(), algorithm, *over))
        assert sum(p.loss.item() for p in parts) == pytest.approx(expected.loss.item(), rel=1e-12)
        for name, value in expected.sums.items():
            assert sum(p.sums[name].item() for p in parts if name in p.sums) == pytest.approx(value.item())
        for name, value in expected.maxima.items():
            assert max(p.maxima[name].item() for p in parts) == pytest.approx(value.item())


def empty_inputs() -> LossInputs:
    nothing = torch.zeros(0, dtype=torch.float64)
    return LossInputs(
        logprobs=nothing.clone().requires_grad_(),
        entropy=None,
        old_logprobs=nothing,
        engine_logprobs=nothing,
        ref_logprobs=nothing,
        advantages=nothing,
        loss_mask=torch.zeros(0, dtype=torch.bool),
        sequence_ids=torch.zeros(0, dtype=torch.int64),
    )


def test_an_all_masked_micro_batch_gives_zero_and_a_zero_gradient():
    inputs = make_inputs()
    inputs = dataclasses.replace(inputs, loss_mask=torch.zeros_like(inputs.loss_mask))
    out = policy_loss(inputs, AlgorithmConfig(), 10, 2)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert inputs.logprobs.grad.abs().max().item() == 0.0
    assert all(v.item() == 0.0 for v in {**out.sums, **out.maxima}.values())


def test_importance_weights_carry_no_gradient_and_are_reported():
    inputs = make_inputs()
    inputs = dataclasses.replace(inputs, old_logprobs=inputs.old_logprobs.clone().requires_grad_())
    algorithm = AlgorithmConfig(importance=ImportanceConfig(level="token", cap=1.1))
    out = policy_loss(inputs, algorithm, *denominators(inputs))
    rows = inputs.loss_mask
    raw = (inputs.old_logprobs - inputs.engine_logprobs).detach()[rows].exp()
    assert out.sums["actor/importance_weight"].item() == pytest.approx(raw.clamp(max=1.1).mean().item())
    capped = (raw > 1.1).double().mean().item()
    assert out.sums["actor/importance_weight_capped"].item() == pytest.approx(capped)
    assert out.maxima["actor/importance_weight_max"].item() == pytest.approx(raw.max().item())
    lifted = dataclasses.replace(inputs, engine_logprobs=inputs.engine_logprobs.clone().requires_grad_())
    policy_loss(lifted, algorithm, *denominators(inputs)).loss.backward()
    assert lifted.engine_logprobs.grad is None


def test_mismatch_metrics_match_their_definitions():
    """KL(engine || trainer) as k1 and k3, |dlogp|, effective sample size; over loss tokens, however cut."""
    inputs = make_inputs(5)
    over = denominators(inputs)
    parts = [policy_loss(cut(inputs, c), AlgorithmConfig(), *over) for c in ([0, 1], [2, 3])]
    sums = {name: sum(p.sums[name].item() for p in parts) for name in parts[0].sums}
    found = with_effective_sample_size(sums)
    rows = inputs.loss_mask.nonzero()[:, 0].tolist()
    gaps = [(inputs.old_logprobs[j] - inputs.engine_logprobs[j]).item() for j in rows]
    weights = [math.exp(d) for d in gaps]
    n = len(rows)
    assert found["training/rollout_kl_k1"] == pytest.approx(-sum(gaps) / n)
    assert found["training/rollout_kl_k3"] == pytest.approx(
        sum(w - d - 1 for w, d in zip(weights, gaps, strict=True)) / n
    )
    assert found["training/rollout_logprobs_diff_mean"] == pytest.approx(sum(map(abs, gaps)) / n)
    assert found["training/rollout_ess"] == pytest.approx(
        sum(weights) ** 2 / (n * sum(w * w for w in weights))
    )
    assert 0 < found["training/rollout_ess"] < 1
    assert not any("square" in name for name in found)


def test_an_extreme_ratio_stays_finite():
    inputs = make_inputs()
    inputs = dataclasses.replace(inputs, old_logprobs=inputs.logprobs.detach() - 500.0)
    inputs = dataclasses.replace(inputs, advantages=-torch.ones_like(inputs.advantages))
    out = policy_loss(inputs, AlgorithmConfig(), *denominators(inputs))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.exp(20.0))
    assert torch.isfinite(inputs.logprobs.grad).all()


def test_a_missing_input_is_an_error():
    inputs = dataclasses.replace(make_inputs(), ref_logprobs=None, entropy=None)
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(inputs, AlgorithmConfig(kl=KlConfig(coef=0.1)), 1, 1)
    with pytest.raises(ValueError, match="entropy"):
        policy_loss(inputs, AlgorithmConfig(entropy_coeff=0.1), 1, 1)
    with pytest.raises(ValueError, match="loss tokens"):
        policy_loss(inputs, AlgorithmConfig(), 0, 0)
