"""Row statistics of (a shard of) materialised logits, their merge over shards, and the logits' gradient.

Statistics are (m, s, b, z) in base 2 for x = logit / temperature * log2(e): m = max x, s = sum 2^(x - m),
b = sum 2^(x - m) (x - m), z = x of the target where this shard owns it, else 0. An empty shard has
m = -inf and zeros. b is taken relative to the maximum, so that entropy = (log2 s - b / s) ln 2 cancels
nothing, however large the logits are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


def logits_stats(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_start: int = 0,
    real: int | None = None,
    temperature: float = 1.0,
    split: int | None = None,
) -> Tensor:
    """[S, 4, N] fp32 (fp64 for fp64 logits): statistics of every `split` columns of the first `real` ones.

    logits [N, V] fp32, bf16 or fp64; target [N] int64 global ids (anything outside the shard counts as not
    owned); S = ceil(V / split). One copy of a split is alive at a time.
    """
    n, width = logits.shape
    real = width if real is None else real
    split = split or max(width, 1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = torch.zeros(max(-(-width // split), 1), 4, n, dtype=dtype, device=logits.device)
    parts[:, 0] = -torch.inf
    column = target - vocab_start
    for i, part in enumerate(parts):
        lo, hi = i * split, min((i + 1) * split, real)
        if lo >= hi:
            continue
        x = logits[:, lo:hi].to(dtype) * (LOG2E / temperature)
        own = (column >= lo) & (column < hi)
        part[3] = x.gather(1, (column - lo).clamp(0, hi - lo - 1)[:, None])[:, 0].masked_fill(~own, 0.0)
        part[0] = x.amax(1)
        x.sub_(part[0].masked_fill(part[0] == -torch.inf, 0.0)[:, None])
        p = x.exp2()
        part[1] = p.sum(1)
        part[2] = torch.linalg.vecdot(p, x.masked_fill_(x == -torch.inf, 0.0))
    return parts


def merge_stats(parts: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """parts [S, 4, N], target [N] -> (log-probability, entropy, log-sum-exp), natural base, each [N].

    Parts are merged one after another, in order: the same parts give the same bits. Rows with a negative
    target are ignored: 0 in all three.
    """
    m, s, b, z = parts[0].clone().unbind(0)
    for mi, si, bi, zi in parts[1:]:
        top = torch.maximum(m, mi)
        shift, shift_i = (torch.where(x == -torch.inf, x, x - top) for x in (m, mi))
        scale, scale_i = shift.exp2(), shift_i.exp2()
        zero = torch.zeros_like(s)
        b = torch.where(scale > 0, (b + s * shift) * scale, zero) + torch.where(
            scale_i > 0, (bi + si * shift_i) * scale_i, zero
        )
        s, z, m = s * scale + si * scale_i, z + zi, top
    log_s = s.log2()
    keep = target >= 0
    out = ((z - m) - log_s, log_s - b / s, m + log_s)
    return tuple(torch.where(keep, v * LN2, torch.zeros_like(v)) for v in out)  # type: ignore[return-value]


def logits_backward_(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    *,
    vocab_start: int = 0,
    real: int | None = None,
    temperature: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """[N, V] gradient of the raw logits, written over `logits`, or into `out` (e.g. bf16) which is returned.

    d logprob / dx = onehot - p;  d entropy / dx = -p (log p + entropy). Columns from `real` on and rows with
    a negative target get exactly 0, whatever they held.
    """
    width = logits.shape[1]
    real = width if real is None else real
    column = target - vocab_start
    x = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    logp = x.div_(temperature).sub_(lse[:, None])
    p = logp.exp()
    if grad_entropy is None:
        d = p.mul_(grad_logprob[:, None]).neg_()
    else:
        h = logp.masked_fill_(p == 0, 0.0).add_(entropy[:, None]).mul_(grad_entropy[:, None])
        d = p.mul_(h.add_(grad_logprob[:, None])).neg_()
    own = (column >= 0) & (column < real)
    if width:
        hit = torch.where(own, grad_logprob, torch.zeros_like(grad_logprob))
        d.scatter_add_(1, column.clamp(0, width - 1)[:, None], hit[:, None])
    d.div_(temperature)
    d[:, real:] = 0.0
    d.masked_fill_((target < 0)[:, None], 0.0)
    target_buffer = logits if out is None else out
    return target_buffer.copy_(d)
