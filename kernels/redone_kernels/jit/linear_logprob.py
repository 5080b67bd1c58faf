"""The head's matrix kernels: logits live in registers only (forward) or in one chunk (gradient)."""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
FAR = tl.constexpr(-1000.0)  # 2^FAR is 0 in fp32


@triton.jit
def _source(ptr, rows, H: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """What `_tile` reads [rows, H] from: a TMA descriptor, or the pointer itself."""
    if TMA:
        return tl.make_tensor_descriptor(ptr, shape=[rows, H], strides=[H, 1], block_shape=[ROWS, BK])
    else:
        return ptr


@triton.jit
def _tile(
    x, w, first_row, first_column, n, rows_w, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, UP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """fp32 [BM, BN] of x[first_row:] @ w[first_column:].T; rows beyond n and rows_w read as 0.

    UP: multiply in fp32, because the interpreter cannot multiply bf16.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    rm = first_row + tl.arange(0, BM)
    rn = first_column + tl.arange(0, BN)
    for k in range(0, H, BK):
        if TMA:
            a = x.load([first_row, k])
            b = w.load([first_column, k])
        else:
            rk = k + tl.arange(0, BK)
            a = tl.load(
                x + rm[:, None].to(tl.int64) * H + rk[None, :],
                mask=(rm < n)[:, None] & (rk < H)[None, :],
                other=0.0,
            )
            b = tl.load(
                w + rn[:, None].to(tl.int64) * H + rk[None, :],
                mask=(rn < rows_w)[:, None] & (rk < H)[None, :],
                other=0.0,
            )
        if UP:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return acc


# Sizes that change with the batch or the shard are not specialised (1, multiples of 16): one compilation
# serves them all, and nothing in these kernels gains from knowing them.
@triton.jit(do_not_specialize=["n", "rows_w", "real", "split", "vocab_start"])
def linear_stats(
    x_ptr, w_ptr, target_ptr, part_ptr, n, rows_w, real, split, vocab_start, scale,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ENT: tl.constexpr, UP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(m, s, b, z) of BM rows and one split of the vocabulary, no logits stored; grid (ceil(n / BM), splits).

    The row index runs fastest, so that concurrent programs share their panel of `w` in the L2 cache. A split
    starts at its own first column, whatever the shard: the arithmetic of a row depends on nothing else.
    """
    first_row = tl.program_id(0) * BM
    j = tl.program_id(1)
    rm = first_row + tl.arange(0, BM)
    live = rm < n
    column = (tl.load(target_ptr + rm, mask=live, other=-1) - vocab_start).to(tl.int32)
    lo = j * split
    hi = tl.minimum(lo + split, real)
    m = tl.full((BM,), NEG_INF, tl.float32)
    s = tl.zeros((BM,), tl.float32)
    b = tl.zeros((BM,), tl.float32)
    z = tl.zeros((BM,), tl.float32)
    xs = _source(x_ptr, n, H, BM, BK, TMA)
    ws = _source(w_ptr, rows_w, H, BN, BK, TMA)
    column = tl.where((column >= lo) & (column < hi), column, -1)
    for first in range(lo, hi, BN):
        x = _tile(xs, ws, first_row, first, n, rows_w, H, BM, BN, BK, UP, TMA) * scale
        c = first + tl.arange(0, BN)
        z += tl.sum(tl.where(c[None, :] == column[:, None], x, 0.0), 1)
        x = tl.where((c < hi)[None, :], x, NEG_INF)
        top = tl.maximum(m, tl.max(x, 1))
        base = tl.where(top == NEG_INF, 0.0, top)
        keep = tl.exp2(m - base)
        d = x - base[:, None]
        d = tl.where(d < FAR, FAR, d)  # 0 * -inf would be NaN; a selection keeps NaN, tl.maximum would not
        p = tl.exp2(d)
        if ENT:
            shift = tl.where(m == NEG_INF, 0.0, m - base)
            b = (b + s * shift) * keep + tl.sum(p * d, 1)
        s = s * keep + tl.sum(p, 1)
        m = top
    out = part_ptr + j.to(tl.int64) * 4 * n + rm
    tl.store(out, m, mask=live)
    tl.store(out + n, s, mask=live)
    tl.store(out + 2 * n, b, mask=live)
    tl.store(out + 3 * n, z, mask=live)


@triton.jit(do_not_specialize=["n", "rows_w", "real", "first_column", "width", "vocab_start"])
def linear_dlogits(
    x_ptr, w_ptr, target_ptr, lse_ptr, entropy_ptr, grad_ptr, grad_entropy_ptr, out_ptr,
    n, rows_w, real, first_column, width, out_stride, vocab_start, inv_temperature,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_ENT: tl.constexpr, UP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out [n, width] = gradient of the logits of columns first_column .. first_column + width, recomputed."""
    first_row = tl.program_id(0) * BM
    first = first_column + tl.program_id(1) * BN
    xs = _source(x_ptr, n, H, BM, BK, TMA)
    ws = _source(w_ptr, rows_w, H, BN, BK, TMA)
    acc = _tile(xs, ws, first_row, first, n, rows_w, H, BM, BN, BK, UP, TMA)
    rm = first_row + tl.arange(0, BM)
    c = first + tl.arange(0, BN)
    live = rm < n
    target = tl.load(target_ptr + rm, mask=live, other=-1)
    g = tl.load(grad_ptr + rm, mask=live, other=0.0)
    logp = acc * inv_temperature - tl.load(lse_ptr + rm, mask=live, other=0.0)[:, None]
    p = tl.exp(logp)
    hit = c[None, :] == (target - vocab_start).to(tl.int32)[:, None]
    d = tl.where(hit, g[:, None], 0.0) - p * g[:, None]
    if HAS_ENT:
        h = tl.where(p == 0.0, 0.0, logp) + tl.load(entropy_ptr + rm, mask=live, other=0.0)[:, None]
        d -= p * (h * tl.load(grad_entropy_ptr + rm, mask=live, other=0.0)[:, None])
    d = tl.where((c < real)[None, :] & (target >= 0)[:, None], d * inv_temperature, 0.0)
    inside = live[:, None] & (c < first_column + width)[None, :]
    at = out_ptr + rm[:, None].to(tl.int64) * out_stride + (c - first_column)[None, :]
    tl.store(at, d.to(out_ptr.dtype.element_ty), mask=inside)
