"""Log-probability, entropy and log-sum-exp of a vocabulary-sharded head without whole logits.

Backend "reference" is the definition under autograd; "chunked" keeps the logits of `chunk_tokens` rows alive
(matrix products of the library, one-pass row kernels); "fused" never stores logits in the forward and
recomputes one split of the vocabulary at a time in the backward. Both of the latter recompute: nothing of
size N x V is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from redone_kernels import launch, matmul, reference
from redone_kernels.fused import linear_dlogits, linear_stats
from redone_kernels.logits import logits_backward_, logits_stats, merge_stats
from redone_kernels.shard import SPLITS, Shard

__all__ = ["LogprobOut", "linear_logprob"]

Entropy = Literal["none", "metric", "grad"]
Backend = Literal["auto", "reference", "chunked", "fused"]


class LogprobOut(NamedTuple):
    logprob: Tensor  # [N] fp32 (fp64 for fp64 inputs), the same on every rank of the group; 0 on ignored rows
    entropy: Tensor | None  # [N]; None for entropy="none", without gradient for "metric"
    lse: Tensor  # [N] log-sum-exp of the scaled logits, without gradient


@dataclass(frozen=True, slots=True)
class _Plan:
    shard: Shard
    temperature: float
    entropy: Entropy
    fused: bool
    chunk: int  # rows
    reduce_hidden: bool
    weight_grad: Tensor | None

    @property
    def vocab_size(self) -> int:
        return self.shard.start + self.shard.real


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    entropy: Entropy = "none",
    backend: Backend = "auto",
    chunk_tokens: int = 4096,
    splits_per_full_vocab: int = SPLITS,
    wgrad_out: Tensor | None = None,
    dhidden_reduce: Literal["none", "all_reduce"] = "none",
) -> LogprobOut:
    """log softmax(hidden @ weight.T / temperature)[target] over the vocabulary of all ranks of `tp_group`.

    hidden [N, H], weight [V_local, H] (ids from vocab_start on), one dtype: bf16, fp32, or fp64 (not fused);
    target [N] int64 global ids, negative: ignored (0 out, gradient exactly 0, NaN allowed); ids >= vocab_size
    are padding. The gradient of `weight` is added to wgrad_out [V_local, H] fp32 where given (Megatron's
    main_grad), returned otherwise. The gradient of `hidden` is this shard's share unless
    dhidden_reduce="all_reduce". Fused results are bitwise the same for 1, 2, 4 and 8 equal shards (of a
    vocabulary that is a multiple of 8) and for any batch composition. Raises ValueError where the
    backend cannot serve the inputs.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    if hidden.dtype != weight.dtype or hidden.shape[1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden {hidden.dtype} {tuple(hidden.shape)} against weight {weight.dtype} {tuple(weight.shape)}"
        )
    if backend == "auto":
        backend = "fused" if hidden.is_cuda and hidden.dtype in launch.STATS_TILES else "chunked"
    if backend == "reference":
        if tp_group is not None or vocab_start or wgrad_out is not None:
            raise ValueError("backend 'reference' knows no shards and no wgrad_out; use 'chunked'")
        return _reference(hidden, weight, target, vocab_size, temperature, entropy)
    plan = _Plan(
        shard=Shard.of(weight, vocab_start, vocab_size, tp_group, splits_per_full_vocab),
        temperature=temperature, entropy=entropy, fused=backend == "fused", chunk=chunk_tokens,
        reduce_hidden=dhidden_reduce == "all_reduce", weight_grad=wgrad_out,
    )  # fmt: skip
    logprob, value, lse = _LinearLogprob.apply(hidden.contiguous(), weight, target, plan)
    if entropy == "none":
        return LogprobOut(logprob, None, lse.detach())
    return LogprobOut(logprob, value if entropy == "grad" else value.detach(), lse.detach())


def _reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_size: int | None,
    temperature: float,
    entropy: Entropy,
) -> LogprobOut:
    keep = target >= 0
    hidden = torch.where(keep[:, None], hidden, torch.zeros_like(hidden))
    wide = matmul.wide(hidden.dtype)
    out = reference.linear_logprob(
        hidden.to(wide), weight.to(wide), target.clamp(min=0), temperature=temperature, vocab_size=vocab_size
    )
    zero = torch.zeros_like(out.logprobs)
    logits = hidden.detach().to(wide) @ weight.detach()[:vocab_size].to(wide).T / temperature
    lse = torch.where(keep, logits.logsumexp(-1), zero)
    value = torch.where(keep, out.entropy, zero)
    kept = {"none": None, "metric": value.detach(), "grad": value}[entropy]
    return LogprobOut(torch.where(keep, out.logprobs, zero), kept, lse)


def _chunks(n: int, chunk: int) -> Iterator[slice]:
    return (slice(i, min(i + chunk, n)) for i in range(0, n, chunk))


def _parts(hidden: Tensor, weight: Tensor, target: Tensor, plan: _Plan) -> Tensor:
    """[S, 4, N] statistics of this rank's shard."""
    shard = plan.shard
    if plan.fused:
        return linear_stats(
            hidden,
            weight,
            target,
            shard.start,
            shard.real,
            shard.split,
            plan.temperature,
            plan.entropy != "none",
        )
    parts = hidden.new_empty(1, 4, hidden.shape[0], dtype=matmul.wide(hidden.dtype))
    for rows in _chunks(hidden.shape[0], plan.chunk):
        parts[:, :, rows] = logits_stats(
            matmul.project(hidden[rows], weight), target[rows], vocab_start=shard.start,
            vocab_size=plan.vocab_size, temperature=plan.temperature,
        )  # fmt: skip
    return parts


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, plan: _Plan) -> tuple[Tensor, ...]:
        parts = plan.shard.gather(_parts(hidden, weight, target, plan))
        logprob, entropy, lse = merge_stats(parts, target)
        ctx.save_for_backward(hidden, weight, target, lse, entropy)
        ctx.plan = plan
        ctx.mark_non_differentiable(lse)
        return logprob, entropy, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, lse, entropy = ctx.saved_tensors
        plan: _Plan = ctx.plan
        wide = matmul.wide(hidden.dtype)
        into = plan.weight_grad
        if into is None:
            into = torch.zeros_like(weight, dtype=wide)
        grad_hidden = torch.empty_like(hidden)
        grad_entropy = grads[1].contiguous() if plan.entropy == "grad" else None
        for rows in _chunks(hidden.shape[0], plan.chunk):
            x = hidden[rows]
            # an ignored row may hold NaN, and 0 * NaN would reach the weight's gradient
            x = torch.where((target[rows] >= 0)[:, None], x, torch.zeros_like(x))
            values = [target[rows], lse[rows], entropy[rows], grads[0][rows].contiguous()]
            values.append(None if grad_entropy is None else grad_entropy[rows])
            dx = torch.zeros_like(x, dtype=wide)
            (_fused_grads if plan.fused else _chunked_grads)(x, weight, values, plan, dx, into)
            if plan.reduce_hidden:
                plan.shard.reduce(dx)
            grad_hidden[rows] = dx
        grad_weight = into.to(weight.dtype) if plan.weight_grad is None else None
        return grad_hidden, grad_weight, None, None


def _chunked_grads(
    x: Tensor, weight: Tensor, values: list[Any], plan: _Plan, dx: Tensor, into: Tensor
) -> None:
    """Add the gradients of the rows `x` to dx [n, H] and into [V_local, H]."""
    logits = matmul.project(x, weight)
    out = None if x.dtype == logits.dtype else torch.empty_like(logits, dtype=x.dtype)
    dlogits = logits_backward_(
        logits, *values, vocab_start=plan.shard.start, vocab_size=plan.vocab_size,
        temperature=plan.temperature, out=out,
    )  # fmt: skip
    matmul.add_hidden_grad(dx, dlogits, weight)
    matmul.add_weight_grad(into, dlogits, x)


def _fused_grads(x: Tensor, weight: Tensor, values: list[Any], plan: _Plan, dx: Tensor, into: Tensor) -> None:
    """`_chunked_grads`, one split of the vocabulary alive at a time."""
    shard = plan.shard
    for columns in _chunks(shard.width, shard.split):
        dlogits = linear_dlogits(
            x, weight, *values, columns.start, columns.stop - columns.start, shard.start, shard.real,
            plan.temperature,
        )  # fmt: skip
        matmul.add_hidden_grad(dx, dlogits, weight[columns])
        matmul.add_weight_grad(into[columns], dlogits, x)
