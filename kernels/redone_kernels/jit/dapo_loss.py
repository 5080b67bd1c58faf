"""DAPO loss, gradient and metric partial sums in one pass over the tokens."""

import triton
import triton.language as tl

LIMIT = tl.constexpr(20.0)  # reference.dapo.RATIO_EXPONENT_LIMIT and reference.dapo_loss.KL_EXPONENT_LIMIT
KL_LIMIT = tl.constexpr(10.0)  # reference.dapo_loss.KL_VALUE_LIMIT


@triton.jit
def _limit(x):
    """Clamp to +-LIMIT by selection, so that NaN stays NaN (tl.minimum and tl.maximum would drop it)."""
    x = tl.where(x > LIMIT, LIMIT, x)
    return tl.where(x < -LIMIT, -LIMIT, x)


@triton.jit
def _put(part, index, value):
    tl.store(part + index, tl.sum(value, 0))


@triton.jit
def _put_max(part, index, value):
    tl.store(part + index, tl.max(value, 0))


@triton.jit
def _read(x, offsets, keep, mask):
    return tl.where(mask, tl.load(x + offsets, mask=keep, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _surrogate(new, old, adv, low, high, dual_clip, HAS_DUAL: tl.constexpr, BLOCK: tl.constexpr):
    """(loss, its gradient by `new`, limited log-ratio, ratio, clipped, clipped by the dual bound)."""
    diff = new - old
    d = _limit(diff)
    ratio = tl.exp(d)
    bound = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    plain = -adv * ratio
    bounded = -adv * bound
    clipped = bounded > plain
    pg = tl.where(clipped, bounded, plain)
    flat = clipped | (tl.abs(diff) > LIMIT)
    dual = tl.zeros((BLOCK,), tl.int1)
    if HAS_DUAL:
        ceiling = -adv * dual_clip
        dual = (adv < 0) & (pg > ceiling)
        pg = tl.where(dual, ceiling, pg)
        flat = flat | dual
    return pg, tl.where(flat, 0.0, plain), d, ratio, clipped, dual


@triton.jit
def _importance(old, rollout, tis_cap, TIS_MASK: tl.constexpr):
    """(weight, raw weight, capped) of truncated, or masked, importance sampling."""
    raw = tl.exp(_limit(old - rollout))
    capped = raw > tis_cap
    return tl.where(capped, 0.0 if TIS_MASK else tis_cap, raw), raw, capped


@triton.jit
def _divergence(gap, KL: tl.constexpr, BLOCK: tl.constexpr):
    """(estimate k1, k2 or k3 of the divergence, its gradient by the new log-probability)."""
    if KL == 1:
        kl = -gap
        dkl = tl.full((BLOCK,), 1.0, tl.float32)
    elif KL == 2:
        kl = 0.5 * gap * gap
        dkl = -gap
    else:
        e = _limit(gap)
        grown = tl.exp(e)
        kl = grown - e - 1.0
        dkl = tl.where((tl.abs(gap) > LIMIT) | (kl > KL_LIMIT), 0.0, 1.0 - grown)
        kl = tl.where(kl > KL_LIMIT, KL_LIMIT, kl)
    return kl, dkl


@triton.jit
def dapo_loss(
    new_ptr, old_ptr, adv_ptr, mask_ptr, ref_ptr, rollout_ptr, ent_ptr, grad_ptr, part_ptr,
    n, inv_denom, low, high, dual_clip, tis_cap, kl_beta, ent_coef,
    HAS_DUAL: tl.constexpr, HAS_TIS: tl.constexpr, TIS_MASK: tl.constexpr, HAS_ROLLOUT: tl.constexpr,
    KL: tl.constexpr, HAS_ENT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Tokens [n] fp32 -> gradient [n] (divided by the denominator), part [programs, WIDTH] in METRICS' order.

    low, high: the ratio's bounds. KL: 0 none, 1/2/3 the estimator.
    """
    pid = tl.program_id(0)
    o = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = o < n
    m = tl.load(mask_ptr + o, mask=keep, other=0) != 0
    new = _read(new_ptr, o, keep, m)
    old = _read(old_ptr, o, keep, m)
    adv = _read(adv_ptr, o, keep, m)
    probe = new * 0.0 + old * 0.0 + adv * 0.0  # NaN where an input is NaN or infinite
    pg, grad, d, ratio, clipped, dual = _surrogate(new, old, adv, low, high, dual_clip, HAS_DUAL, BLOCK)

    rollout_diff = tl.zeros((BLOCK,), tl.float32)
    prob_diff = tl.zeros((BLOCK,), tl.float32)
    raw = tl.zeros((BLOCK,), tl.float32)
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    capped = tl.zeros((BLOCK,), tl.int1)
    if HAS_ROLLOUT:
        rollout = _read(rollout_ptr, o, keep, m)
        probe += rollout * 0.0
        rollout_diff = tl.abs(old - rollout)
        prob_diff = tl.abs(tl.exp(old) - tl.exp(rollout))
        if HAS_TIS:
            weight, raw, capped = _importance(old, rollout, tis_cap, TIS_MASK)
    pg *= weight
    grad *= weight
    loss = pg

    kl = tl.zeros((BLOCK,), tl.float32)
    if KL > 0:
        ref = _read(ref_ptr, o, keep, m)
        probe += ref * 0.0
        kl, dkl = _divergence(ref - new, KL, BLOCK)
        loss += kl_beta * kl
        grad += kl_beta * dkl
    entropy = tl.zeros((BLOCK,), tl.float32)
    if HAS_ENT:
        entropy = _read(ent_ptr, o, keep, m)
        probe += entropy * 0.0
        loss -= ent_coef * entropy

    grad = tl.where(m, grad, 0.0)
    tl.store(grad_ptr + o, grad * inv_denom, mask=keep)
    bad = m & (probe + loss * 0.0 != 0)
    part = part_ptr + pid.to(tl.int64) * WIDTH
    _put_counts(part, m, adv, clipped, dual, capped, bad)
    _put(part, 0, tl.where(m, loss, 0.0))
    _put(part, 1, tl.where(m, pg, 0.0))
    _put(part, 6, -d)
    _put(part, 7, tl.where(m, ratio - 1.0 - d, 0.0))
    _put(part, 8, tl.where(m, kl, 0.0))
    _put(part, 9, tl.where(m, weight, 0.0))
    _put(part, 11, tl.where(m, ratio, 0.0))
    _put(part, 12, entropy)
    _put(part, 13, tl.abs(grad))
    _put(part, 15, rollout_diff)
    _put(part, 16, tl.where(m, prob_diff, 0.0))
    _put_max(part, 17, tl.where(m, ratio, 0.0))
    _put_max(part, 18, tl.abs(new - old))
    _put_max(part, 19, rollout_diff)
    _put_max(part, 20, tl.where(m, prob_diff, 0.0))
    _put_max(part, 21, tl.where(m, raw, 0.0))


@triton.jit
def _put_counts(part, m, adv, clipped, dual, capped, bad):
    """The columns that count tokens."""
    _put(part, 2, tl.where(m, 1.0, 0.0))
    _put(part, 3, tl.where(clipped & (adv > 0), 1.0, 0.0))
    _put(part, 4, tl.where(clipped & (adv < 0), 1.0, 0.0))
    _put(part, 5, tl.where(dual, 1.0, 0.0))
    _put(part, 10, tl.where(capped & m, 1.0, 0.0))
    _put(part, 14, tl.where(bad, 1.0, 0.0))


@triton.jit
def reduce_parts(
    part_ptr, out_ptr, loss_ptr, programs, inv_denom,
    SUMS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """part [programs, WIDTH] -> out [WIDTH]: columns below SUMS added, the others' maximum, in a fixed order.

    One program. The loss scalar is out[0] * inv_denom.
    """
    c = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    top = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, programs, ROWS):
        r = first + tl.arange(0, ROWS)
        x = tl.load(part_ptr + r[:, None] * WIDTH + c[None, :], mask=(r < programs)[:, None], other=0.0)
        total += tl.sum(x, 0)
        top = tl.maximum(top, tl.max(x, 0))
    out = tl.where(c < SUMS, total, top)
    tl.store(out_ptr + c, out)
    tl.store(loss_ptr + c, out * inv_denom, mask=c == 0)
