"""Heads of other projects, on the same inputs: each of them is a mean cross-entropy of (x, weight, target).

A peer that is not installed is absent from the results; one that fails is listed with its message.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# what a kernel of somebody else may raise on a version or a device it was not made for
FAILURES = (
    ImportError,
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    KeyError,
    OSError,
)


def naive(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Whole logits, as most trainers have it."""
    logp = (x @ weight.T).float().log_softmax(-1)
    return -logp.gather(1, target[:, None])[:, 0].mean()


def naive_forward(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) from whole logits."""
    logp = (x @ weight.T).float().log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, target: loss(w, x, target)


def _cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w, target: linear_cross_entropy(x, w, target)


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, w, target: chunked_linear_cross_entropy(x, w, target)


def _torch() -> Loss:
    fused = torch.nn.functional.linear_cross_entropy  # type: ignore[attr-defined]  # newer PyTorch only
    return lambda x, w, target: fused(x, w, target)


def _verl() -> Loss:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        logprobs, _ = linear_cross_entropy(x, w, target, 1.0, "none")
        return -logprobs.mean()

    return loss


def find() -> dict[str, Callable[[], Loss]]:
    """Name -> what makes the loss, of everything that is installed."""
    installed = {
        "naive-compiled": (True, lambda: torch.compile(naive)),
        "torch-linear_cross_entropy": (hasattr(torch.nn.functional, "linear_cross_entropy"), _torch),
        "liger-kernel": (importlib.util.find_spec("liger_kernel") is not None, _liger),
        "cut-cross-entropy": (importlib.util.find_spec("cut_cross_entropy") is not None, _cut_cross_entropy),
        "quack": (importlib.util.find_spec("quack") is not None, _quack),
        "verl": (importlib.util.find_spec("verl") is not None, _verl),
    }
    return {name: make for name, (there, make) in installed.items() if there}
