"""Per-sequence sums of a packed batch, one program a sequence: a fixed order, no atomics."""

import triton
import triton.language as tl


@triton.jit
def segment_sum(value_ptr, mask_ptr, cu_ptr, sum_ptr, count_ptr, BLOCK: tl.constexpr):
    """values [N] fp32, mask [N] -> sum and count [S] of the masked rows of each sequence; grid (S,)."""
    i = tl.program_id(0)
    lo = tl.load(cu_ptr + i)
    hi = tl.load(cu_ptr + i + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for first in range(lo, hi, BLOCK):
        o = first + tl.arange(0, BLOCK)
        m = tl.load(mask_ptr + o, mask=o < hi, other=0) != 0
        total += tl.where(m, tl.load(value_ptr + o, mask=o < hi, other=0.0).to(tl.float32), 0.0)
        count += tl.where(m, 1.0, 0.0)
    tl.store(sum_ptr + i, tl.sum(total, 0))
    tl.store(count_ptr + i, tl.sum(count, 0))


@triton.jit
def segment_spread(grad_ptr, mask_ptr, cu_ptr, out_ptr, BLOCK: tl.constexpr):
    """out [N]: every masked row gets its sequence's gradient, the others 0; grid (S,)."""
    i = tl.program_id(0)
    lo = tl.load(cu_ptr + i)
    hi = tl.load(cu_ptr + i + 1)
    g = tl.load(grad_ptr + i)
    for first in range(lo, hi, BLOCK):
        o = first + tl.arange(0, BLOCK)
        m = tl.load(mask_ptr + o, mask=o < hi, other=0) != 0
        tl.store(out_ptr + o, tl.where(m, g, 0.0), mask=o < hi)
