"""Inputs and distances shared by the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from redone_kernels.reference import DapoConfig
from torch import Tensor


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in fp64; |a| where b is 0."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / (b.norm() if b.norm() > 0 else 1.0))


def worst(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    if not a.numel():
        return 0.0
    return float((a.detach().double() - b.detach().double()).abs().nan_to_num(nan=torch.inf).max())


@dataclass(frozen=True)
class Head:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [N], about one in eight ignored

    @classmethod
    def random(
        cls, n: int, h: int, v: int, device: torch.device, *, dtype: torch.dtype = torch.float32,
        scale: float = 1.0, ignore: bool = True, vocab_size: int | None = None,
    ) -> Head:  # fmt: skip
        """Logits of standard deviation about `scale`."""
        hidden = (torch.randn(n, h) * scale / h**0.5).to(dtype)
        target = torch.randint(0, vocab_size or v, (n,))
        if ignore:
            target[torch.rand(n) < 0.125] = -100
        return cls(hidden.to(device), torch.randn(v, h).to(dtype).to(device), target.to(device))

    @classmethod
    def shifted(cls, n: int, h: int, v: int, device: torch.device, shift: float) -> Head:
        """Logits near `shift`: the first feature adds it to all of them."""
        head = cls.random(n, h, v, device, ignore=False)
        head.hidden[:, 0], head.weight[:, 0] = 1.0, shift
        return head


def oracle(
    head: Head, *, temperature: float = 1.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, lse) in fp64 by the textbook, 0 on ignored rows; differentiable for fp64 leaves."""
    logits = (head.hidden.double() @ head.weight.double()[:vocab_size].T) / temperature
    logp = logits.log_softmax(-1)
    keep = head.target >= 0
    zero = torch.zeros_like(logp[:, 0])
    picked = logp.gather(1, head.target.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    out = (picked, entropy, logits.logsumexp(-1))
    return tuple(torch.where(keep, x, zero) for x in out)  # type: ignore[return-value]


def tokens(n: int, device: torch.device, *, seed: int = 0) -> dict[str, Any]:
    """Arguments of dapo_loss but denom and cfg; masked rows hold NaN, some advantages reach the dual clip."""
    g = torch.Generator().manual_seed(seed)

    def randn(scale: float) -> Tensor:
        return torch.randn(n, generator=g) * scale

    new = randn(0.5) - 2
    old = new + randn(0.3)
    rows = {
        "logprob": new, "old_logprob": old, "advantage": randn(2.0), "ref_logprob": new + randn(0.3),
        "rollout_logprob": old + randn(0.3), "entropy": randn(1.0).abs(),
    }  # fmt: skip
    old[::11] = new[::11] + 3.0 * randn(1.0).sign()[::11]
    mask = torch.rand(n, generator=g) > 0.3
    for row in rows.values():
        row[~mask] = torch.nan
    return {k: v.to(device) for k, v in (rows | {"mask": mask}).items()}


FULL = DapoConfig(dual_clip=3.0, tis_cap=1.5, kl_beta=0.05, ent_coef=0.02)
CONFIGS = {
    "default": DapoConfig(),
    "full": FULL,
    "mis_k1": DapoConfig(tis_cap=1.2, tis_mode="mask", kl_beta=0.1, kl="k1"),
    "k2": DapoConfig(kl_beta=0.1, kl="k2", dual_clip=2.0),
}


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
