"""Every way the head can compute, in a real trainer, against the reference head and policy_loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from redone_kernels import launch

from redone.config.schema import AlgorithmConfig
from redone.trainer.megatron import optim
from redone.trainer.megatron.step import forward_backward
from redone.trainer.megatron.token_loss import TokenLoss
from redone.types import Shard

HEADS: dict[str, dict[str, Any]] = {
    "reference": {"head": "reference"},
    "gradient in the forward": {},
    "recomputing": {"fuse_loss": False},
    "fused": {"head": "fused"},  # in Triton's interpreter
}
TEMPERATURE = 0.7


def compare(
    build: Callable[..., Any],
    where: tuple[Any, ...],
    cut: Callable[[Any], Shard],
    gradients: Callable[[Any], dict[str, torch.Tensor]],
    change: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """Differences per head: `loss`, worst of the `metrics`, and relative gradient differences of the head's
    `own` weight, of `all` parameters together and of the `worst`.

    build(*where, **options) makes a trainer, `change` replaces sections of its algorithm.
    """
    found = {}
    for name, options in HEADS.items():
        trainer = build(*where, entropy=0.1, kl=0.1, **options)
        optim.zero_grad(trainer.models, trainer.optimizer)
        algorithm = AlgorithmConfig.model_validate(trainer.cfg.algorithm.model_dump() | change)
        plain = patch.object(TokenLoss, "of", lambda *_: None) if name == "reference" else nullcontext()
        with plain, patch.object(launch, "INTERPRET", name == "fused"):
            totals = forward_backward(trainer.models, cut(trainer), algorithm, TEMPERATURE)
        found[name] = totals, gradients(trainer)
        trainer.close()
    want, exact = found.pop("reference")
    result = {}
    for name, (totals, ours) in found.items():
        metrics = totals.metrics()
        assert sorted(metrics) == sorted(want.metrics())
        gaps = [abs(metrics[k] - v) / max(1.0, abs(v)) for k, v in want.metrics().items()]
        result[name] = {"loss": abs(totals.loss - want.loss), "metrics": max(gaps)}
        if ours:  # on rank 0
            errors = {k: float((ours[k] - g).norm() / g.norm()) for k, g in exact.items()}
            total = sum(float(g.norm() ** 2) for g in exact.values())
            squares = sum(float((ours[k] - g).norm() ** 2) for k, g in exact.items())
            result[name] |= {"own": errors["lm_head.weight"], "worst": max(errors.values())}
            result[name]["all"] = (squares / total) ** 0.5
    return result
