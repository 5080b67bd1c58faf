"""The token-level DAPO head with its gradient made in the forward: three matrix products instead of four.

d loss / d logprob of a token depends on that token alone once the denominator is known, so a chunk's logits
can become their own gradient before the next chunk is projected. Not valid for sequence-level ratios.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from redone_kernels import matmul
from redone_kernels.dapo_loss import METRICS, DapoConfig, combine_metrics, dapo_loss
from redone_kernels.logits import logits_backward_, logits_stats, merge_stats
from redone_kernels.shard import SPLITS, Shard

__all__ = ["DapoOut", "linear_dapo"]


class DapoOut(NamedTuple):
    loss: Tensor  # scalar, carries the gradients of hidden and weight
    metrics: Tensor  # [len(METRICS)] raw sums and maxima, see reference.METRICS
    logprob: Tensor  # [N] detached; 0 on rows outside the mask
    entropy: Tensor  # [N] detached


def linear_dapo(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    denom: float,
    cfg: DapoConfig,
    *,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 4096,
    wgrad_out: Tensor | None = None,
    dhidden_reduce: Literal["none", "all_reduce"] = "none",
) -> DapoOut:
    """`dapo_loss` of `linear_logprob` (see both for shapes), gradients included, in one walk over the chunks.

    hidden [N, H], weight [V_local, H]; rows with mask False may hold anything. Without old_logprob the policy
    itself is the old one (ratio exactly 1). With wgrad_out [V_local, H]
    fp32 the weight's gradient is added there in the FORWARD: scale by `denom`, for the gradient that arrives
    at `loss` must then be 1 (to 1e-6, checked on the device without a synchronisation), and is taken as 1.
    """
    shard = Shard.of(weight, vocab_start, vocab_size, tp_group, SPLITS)
    tokens = {
        "target": torch.where(mask & (target >= 0), target, -1),
        "old": old_logprob, "advantage": advantage, "mask": mask & (target >= 0),
        "ref": ref_logprob, "rollout": rollout_logprob,
    }  # fmt: skip
    walk = _Walk(
        shard, temperature, float(denom), cfg, chunk_tokens, wgrad_out, dhidden_reduce == "all_reduce"
    )
    return DapoOut(*_LinearDapo.apply(hidden.contiguous(), weight, tokens, walk))


class _Walk(NamedTuple):
    shard: Shard
    temperature: float
    denom: float
    cfg: DapoConfig
    chunk: int
    weight_grad: Tensor | None
    reduce_hidden: bool


class _LinearDapo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: dict[str, Tensor | None], walk: _Walk
    ) -> tuple[Tensor, ...]:
        wide = matmul.wide(hidden.dtype)
        into = walk.weight_grad if walk.weight_grad is not None else torch.zeros_like(weight, dtype=wide)
        grad_hidden = torch.empty_like(hidden)
        logprob, entropy = (hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(2))
        metrics = []
        for i in range(0, hidden.shape[0], walk.chunk):
            rows = slice(i, min(i + walk.chunk, hidden.shape[0]))
            part = {k: None if v is None else v[rows] for k, v in tokens.items()}
            logprob[rows], entropy[rows], grad_hidden[rows], sums = _chunk(
                hidden[rows], weight, part, walk, into
            )
            metrics.append(sums)
        total = (
            combine_metrics(torch.stack(metrics)) if metrics else hidden.new_zeros(len(METRICS), dtype=wide)
        )
        ctx.ours = walk.weight_grad is None
        ctx.save_for_backward(grad_hidden, into if ctx.ours else None)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(total, logprob, entropy)
        return total[0] / walk.denom, total, logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if not ctx.ours:
            torch._assert_async(
                (grad_loss - 1).abs() <= 1e-6, "linear_dapo with wgrad_out: scale by denom, not the loss"
            )
            return grad_hidden, None, None, None
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype),
            (grad_weight * grad_loss).to(ctx.dtype),
            None,
            None,
        )


def _chunk(
    hidden: Tensor, weight: Tensor, part: dict[str, Any], walk: _Walk, into: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probabilities, entropy, hidden's gradient, metrics) of one chunk; `into` gains the weight's."""
    shard, target = walk.shard, part["target"]
    place: dict[str, Any] = {
        "vocab_start": shard.start, "vocab_size": shard.start + shard.real, "temperature": walk.temperature
    }  # fmt: skip
    x = torch.where((target >= 0)[:, None], hidden, torch.zeros_like(hidden))
    logits = matmul.project(x, weight)
    parts = shard.gather(logits_stats(logits, target, **place))
    logprob, entropy, lse = merge_stats(parts, target)
    bonus = walk.cfg.ent_coef != 0
    with torch.enable_grad():
        leaves = [logprob.detach().requires_grad_(), entropy.detach().requires_grad_()]
        loss, metrics = dapo_loss(
            leaves[0], logprob if part["old"] is None else part["old"], part["advantage"], part["mask"],
            walk.denom, walk.cfg, ref_logprob=part["ref"], rollout_logprob=part["rollout"], entropy=leaves[1],
        )  # fmt: skip
        grads = torch.autograd.grad(loss, leaves if bonus else leaves[:1])
    out = None if x.dtype == logits.dtype else torch.empty_like(logits, dtype=x.dtype)
    dlogits = logits_backward_(
        logits, target, lse, entropy, grads[0], grads[1] if bonus else None, out=out, **place
    )
    dx = torch.zeros_like(x, dtype=logits.dtype)
    matmul.add_hidden_grad(dx, dlogits, weight)
    matmul.add_weight_grad(into, dlogits, x)
    if walk.reduce_hidden:
        shard.reduce(dx)
    return logprob, entropy, dx.to(hidden.dtype), metrics
