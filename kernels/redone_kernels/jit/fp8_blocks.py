"""Many bf16 matrices quantised to fp8 blocks straight into one bucket, by one launch."""

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
AMAX_FLOOR = tl.constexpr(1e-4)


@triton.jit
def _to_e4m3_grid(x):
    """Nearest e4m3 value, ties to even, as fp32; |x| <= 448."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    shift = 24576.0  # 1.5 * 2^23 * 2^-9: adding it leaves steps of 2^-9, the subnormal spacing
    return tl.where(tl.abs(x) < 0.015625, (x + shift) - shift, normal)


@triton.jit
def pack_fp8_blocks(
    table_ptr, block_ptr, value_ptr, scale_ptr, BLOCK: tl.constexpr, FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One BLOCK x BLOCK block of one matrix; grid (blocks of all matrices,).

    table [matrices, FIELDS] int64: source address, rows, columns, first value, first scale, first block;
    block [blocks] int32: the matrix each block belongs to. ALIGNED: every address, column count and first
    value is a multiple of 16. ROUND: round before the cast, for the interpreter's cast loses carries.
    """
    pid = tl.program_id(0)
    entry = table_ptr + tl.load(block_ptr + pid).to(tl.int64) * FIELDS
    source = tl.load(entry).to(tl.pointer_type(tl.bfloat16))
    rows = tl.load(entry + 1).to(tl.int32)
    columns = tl.load(entry + 2).to(tl.int32)
    value = tl.load(entry + 3)
    if ALIGNED:
        source = tl.multiple_of(source, 16)
        columns = tl.multiple_of(columns, 16)
        value = tl.multiple_of(value, 16)
    block = pid - tl.load(entry + 5).to(tl.int32)
    across = tl.cdiv(columns, BLOCK)
    r0 = (block // across) * BLOCK
    c0 = (block % across) * BLOCK
    start = r0.to(tl.int64) * columns + c0
    r = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK)
    inside = (r0 + r < rows)[:, None] & (c0 + c < columns)[None, :]
    at = r[:, None] * columns + c[None, :]
    x = tl.load(source + start + at, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(tl.abs(x), 1), 0)
    scale = tl.div_rn(tl.maximum(amax, AMAX_FLOOR), FP8_MAX)
    values = x * tl.div_rn(1.0, scale)
    if ROUND:
        values = _to_e4m3_grid(values)
    tl.store(value_ptr + value + start + at, values.to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + tl.load(entry + 4) + block, scale)
