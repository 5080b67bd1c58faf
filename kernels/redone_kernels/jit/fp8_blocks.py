"""Many bf16 matrices quantised to fp8 blocks straight into one bucket, by one launch."""

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
AMAX_FLOOR = tl.constexpr(1e-4)


@triton.jit
def pack_fp8_blocks(table_ptr, block_ptr, value_ptr, scale_ptr, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """One BLOCK x BLOCK block of one matrix; grid (blocks of all matrices,).

    table [matrices, FIELDS] int64: source address, rows, columns, first value, first scale, first block;
    block [blocks] int32: the matrix each block belongs to.
    """
    pid = tl.program_id(0)
    entry = table_ptr + tl.load(block_ptr + pid).to(tl.int64) * FIELDS
    source = tl.load(entry).to(tl.pointer_type(tl.bfloat16))
    rows = tl.load(entry + 1)
    columns = tl.load(entry + 2)
    block = pid - tl.load(entry + 5)
    across = tl.cdiv(columns, BLOCK)
    r = (block // across) * BLOCK + tl.arange(0, BLOCK)
    c = (block % across) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    at = r[:, None].to(tl.int64) * columns + c[None, :]
    x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(tl.abs(x), 1), 0)
    scale = tl.div_rn(tl.maximum(amax, AMAX_FLOOR), FP8_MAX)
    values = x * tl.div_rn(1.0, scale)
    tl.store(value_ptr + tl.load(entry + 3) + at, values.to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + tl.load(entry + 4) + block, scale)
