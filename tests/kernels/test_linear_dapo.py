"""linear_dapo: the gradient made in the forward is the gradient of dapo_loss(linear_logprob)."""

from __future__ import annotations

import pytest
import torch
from redone_kernels import reference
from redone_kernels.linear_dapo import linear_dapo
from redone_kernels.reference import METRICS, DapoConfig
from torch import Tensor

from tests.kernels.cases import FULL, Head, doubled, oracle, relative, tokens, worst


def inputs(n: int, device: torch.device) -> tuple[Head, dict[str, Tensor]]:
    head = Head.random(n, 40, 70, device, ignore=False)
    arguments = tokens(n, device)
    logprob = oracle(head)[0].float()
    for name in ("old_logprob", "ref_logprob", "rollout_logprob"):  # near the head's own, mask's NaN kept
        arguments[name] = logprob + (arguments[name] - arguments["logprob"])
    del arguments["logprob"], arguments["entropy"]
    return head, arguments


@pytest.mark.parametrize("cfg", [DapoConfig(), FULL], ids=["default", "full"])
def test_matches_fp64(cfg: DapoConfig, device: torch.device) -> None:
    head, arguments = inputs(23, device)
    hidden, weight = head.hidden.clone(), head.weight.clone()
    hidden[~arguments["mask"]] = torch.nan
    hidden.requires_grad_(), weight.requires_grad_()
    out = linear_dapo(hidden, weight, head.target, **arguments, denom=31.0, cfg=cfg, chunk_tokens=12)
    (out.loss * 2).backward()
    exact = Head(head.hidden.double().requires_grad_(), head.weight.double().requires_grad_(), head.target)
    logprob, entropy, _ = oracle(exact)
    loss, metrics, _ = reference.dapo_loss(
        logprob, **doubled(arguments), entropy=entropy, denom=31.0, cfg=cfg
    )
    (loss * 2).backward()
    assert abs(float(out.loss - loss)) <= 2e-6 * float(metrics[METRICS.index("grad_abs")]) / 31
    assert relative(hidden.grad, exact.hidden.grad) <= 2e-6
    assert relative(weight.grad, exact.weight.grad) <= 2e-6
    assert worst(out.metrics, metrics) <= 1e-5 * float(metrics.abs().max())
    assert worst(out.logprob[arguments["mask"]], logprob[arguments["mask"]]) <= 1e-5


def test_the_policy_itself_is_the_old_one(device: torch.device) -> None:
    """Without old log-probabilities the ratio is exactly 1, and the gradient that of -A log p."""
    head, arguments = inputs(13, device)
    arguments = {k: arguments[k] for k in ("advantage", "mask")} | {"old_logprob": None}
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    out = linear_dapo(
        hidden, weight, head.target, **arguments, denom=3.0, cfg=DapoConfig(dual_clip=3.0), chunk_tokens=6
    )  # type: ignore[arg-type]
    out.loss.backward()
    mask = arguments["mask"]
    assert float(out.metrics[METRICS.index("ratio")]) == float(mask.sum())
    assert float(out.metrics[METRICS.index("ratio_max")]) == 1
    exact = Head(head.hidden.double().requires_grad_(), head.weight.double().requires_grad_(), head.target)
    (-arguments["advantage"].double().nan_to_num() * oracle(exact)[0])[mask].sum().div(3).backward()
    assert relative(hidden.grad, exact.hidden.grad) <= 2e-6
    assert relative(weight.grad, exact.weight.grad) <= 2e-6


def test_weight_gradient_accumulates_in_the_forward(device: torch.device) -> None:
    head, arguments = inputs(12, device)
    into = torch.zeros_like(head.weight)
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    linear_dapo(hidden, weight, head.target, **arguments, denom=5.0, cfg=DapoConfig()).loss.backward()
    again = head.hidden.clone().requires_grad_()
    out = linear_dapo(
        again, head.weight, head.target, **arguments, denom=5.0, cfg=DapoConfig(), wgrad_out=into
    )
    out.loss.backward()
    assert relative(into, weight.grad) <= 1e-6 and torch.equal(again.grad, hidden.grad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device-side assertion ends the CUDA context")
def test_scaled_loss_with_accumulation_is_refused() -> None:
    head, arguments = inputs(6, torch.device("cpu"))
    hidden = head.hidden.clone().requires_grad_()
    into = torch.zeros_like(head.weight)
    out = linear_dapo(
        hidden, head.weight, head.target, **arguments, denom=5.0, cfg=DapoConfig(), wgrad_out=into
    )
    with pytest.raises(RuntimeError, match="scale by denom"):
        (out.loss * 2).backward()
