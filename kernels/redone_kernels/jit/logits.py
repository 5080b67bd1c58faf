"""Row kernels over materialised logits: statistics, their merge, the gradient."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def logits_stats(
    x_ptr, target_ptr, part_ptr, n, width, real, split, row_stride, vocab_start, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """(m, s, b, z) of one row and one split of it; scale = log2(e) / temperature. Grid (n, splits)."""
    r = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    row = x_ptr + r * row_stride
    column = tl.load(target_ptr + r) - vocab_start
    lo = j * split
    hi = tl.minimum(lo + split, real)
    m = tl.full((BLOCK,), NEG_INF, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    for first in range(lo, hi, BLOCK):
        c = first + tl.arange(0, BLOCK)
        # the load's mask ends at `width`, a multiple of 16 in real models: 16-byte loads need to know that
        x = tl.load(row + c, mask=c < width, other=NEG_INF, eviction_policy="evict_first").to(tl.float32)
        x = tl.where(c < hi, x * scale, NEG_INF)
        top = tl.maximum(m, x)
        base = tl.where(top == NEG_INF, 0.0, top)
        shift = tl.where(m == NEG_INF, 0.0, m - base)
        keep = tl.exp2(m - base)
        d = x - base
        p = tl.exp2(d)
        b = (b + s * shift) * keep + tl.where(x == NEG_INF, 0.0, p * d)
        s = s * keep + p
        m = top
    top = tl.max(m, 0)
    base = tl.where(top == NEG_INF, 0.0, top)
    shift = tl.where(m == NEG_INF, 0.0, m - base)
    keep = tl.exp2(m - base)
    out = part_ptr + j.to(tl.int64) * 4 * n + r
    tl.store(out, top)
    tl.store(out + n, tl.sum(s * keep, 0))
    tl.store(out + 2 * n, tl.sum((b + s * shift) * keep, 0))
    own = (column >= lo) & (column < hi)
    z = tl.load(row + tl.where(own, column, 0), mask=own, other=0.0).to(tl.float32) * scale
    tl.store(out + 3 * n, z)


@triton.jit
def merge_stats(
    part_ptr, target_ptr, logprob_ptr, entropy_ptr, lse_ptr, n, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """parts [parts, 4, n] merged one after another, in order: no atomics, the same bits every time."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = r < n
    m = tl.full((BLOCK,), NEG_INF, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    z = tl.zeros((BLOCK,), tl.float32)
    p = part_ptr + r
    for _ in range(0, parts):
        mi = tl.load(p, mask=live, other=NEG_INF)
        si = tl.load(p + n, mask=live, other=0.0)
        bi = tl.load(p + 2 * n, mask=live, other=0.0)
        z += tl.load(p + 3 * n, mask=live, other=0.0)
        top = tl.maximum(m, mi)
        base = tl.where(top == NEG_INF, 0.0, top)
        shift = tl.where(m == NEG_INF, 0.0, m - base)
        shift_i = tl.where(mi == NEG_INF, 0.0, mi - base)
        keep = tl.exp2(m - base)
        keep_i = tl.exp2(mi - base)
        b = (b + s * shift) * keep + (bi + si * shift_i) * keep_i
        s = s * keep + si * keep_i
        m = top
        p += 4 * n
    log_s = tl.log2(s)
    used = tl.load(target_ptr + r, mask=live, other=-1) >= 0
    tl.store(logprob_ptr + r, tl.where(used, ((z - m) - log_s) * LN2, 0.0), mask=live)
    tl.store(entropy_ptr + r, tl.where(used, (log_s - b / s) * LN2, 0.0), mask=live)
    tl.store(lse_ptr + r, tl.where(used, (m + log_s) * LN2, 0.0), mask=live)


@triton.jit
def logits_backward_(
    x_ptr, out_ptr, target_ptr, lse_ptr, entropy_ptr, grad_ptr, grad_entropy_ptr,
    width, real, row_stride, out_stride, vocab_start, inv_temperature,
    HAS_ENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of one row, BLOCK columns; grid (n, ceil(width / BLOCK)). out may be x."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + r)
    g = tl.load(grad_ptr + r)
    x = tl.load(x_ptr + r * row_stride + c, mask=c < width, other=NEG_INF).to(tl.float32)
    logp = x * inv_temperature - tl.load(lse_ptr + r)
    p = tl.exp(logp)
    d = tl.where(c == target - vocab_start, g, 0.0) - p * g
    if HAS_ENT:
        h = tl.where(p == 0.0, 0.0, logp) + tl.load(entropy_ptr + r)
        d -= p * (h * tl.load(grad_entropy_ptr + r))
    d = tl.where((c < real) & (target >= 0), d * inv_temperature, 0.0)
    tl.store(out_ptr + r * out_stride + c, d.to(out_ptr.dtype.element_ty), mask=c < width)
