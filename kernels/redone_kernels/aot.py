"""Every kernel x shipped configuration compiled ahead of time to sm_90a, and what its machine code holds.

Needs no GPU: Triton's wheel brings ptxas and cuobjdump. `python -m redone_kernels.aot [NAME ...]` prints one
JSON object, kernel -> facts, which the tests hold against the golden table beside this file; `--write` renews
the table. Must not run under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from redone_kernels import launch
from redone_kernels.jit import dapo_loss, fp8_blocks, linear_logprob, logits, segment_sum

TARGET = GPUTarget("cuda", 90, 32)
GOLDEN = Path(__file__).with_name(f"golden_sm90a_triton-{triton.__version__}.json")
HIDDEN = 2048  # Qwen3-30B-A3B
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is held against the golden table. Bytes, except where counted."""

    registers: int
    stack: int
    shared: int  # dynamic
    threads: int
    hgmma: int  # tensor-core instructions of Hopper
    hmma: int  # those of the generation before: a dot that missed wgmma
    tma_loads: int
    wide_loads: int  # 16 bytes per thread
    local_in_matrix_loop: int  # LDL/STL in loops with HGMMA and no EX2
    atomics: int


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def _pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def _matrix_cases() -> Iterator[Case]:
    for dtype, pointer in TYPES.items():
        suffix = pointer.strip("*")
        config = launch.STATS_TILES[dtype]
        signature = (
            _pointers("x_ptr w_ptr", pointer)
            | {"target_ptr": "*i64", "part_ptr": "*fp32"}
            | _pointers("n rows_w real split vocab_start", "i32")
            | {"scale": "fp32"}
        )
        for entropy in (False, True):
            constants = {"H": HIDDEN, **config.constants(), "ENT": entropy, "UP": False}
            name = f"linear_stats-{suffix}-{'entropy' if entropy else 'plain'}"
            yield Case(name, linear_logprob.linear_stats, signature, constants, config.options())
        config = launch.DLOGITS_TILES[dtype]
        signature = (
            _pointers("x_ptr w_ptr", pointer)
            | {"target_ptr": "*i64"}
            | _pointers("lse_ptr entropy_ptr grad_ptr grad_entropy_ptr", "*fp32")
            | {"out_ptr": pointer}
            | _pointers("n rows_w real first_column width out_stride vocab_start", "i32")
            | {"inv_temperature": "fp32"}
        )
        for entropy in (False, True):
            constants = {"H": HIDDEN, **config.constants(), "HAS_ENT": entropy, "UP": False}
            name = f"linear_dlogits-{suffix}-{'entropy' if entropy else 'plain'}"
            yield Case(name, linear_logprob.linear_dlogits, signature, constants, config.options())


def _row_cases() -> Iterator[Case]:
    for pointer in TYPES.values():
        suffix = pointer.strip("*")
        signature = (
            {"x_ptr": pointer, "target_ptr": "*i64", "part_ptr": "*fp32"}
            | _pointers("n width real split row_stride vocab_start", "i32")
            | {"scale": "fp32"}
        )
        constants: dict[str, Any] = {"BLOCK": launch.ROW_BLOCK}
        yield Case(f"logits_stats-{suffix}", logits.logits_stats, signature, constants, launch.ROW_OPTIONS)
        signature = (
            {"x_ptr": "*fp32", "out_ptr": pointer, "target_ptr": "*i64"}
            | _pointers("lse_ptr entropy_ptr grad_ptr grad_entropy_ptr", "*fp32")
            | _pointers("width real row_stride out_stride vocab_start", "i32")
            | {"inv_temperature": "fp32"}
        )
        for entropy in (False, True):
            name = f"logits_backward_-{suffix}-{'entropy' if entropy else 'plain'}"
            constants = {"HAS_ENT": entropy, "BLOCK": launch.ROW_BLOCK}
            yield Case(name, logits.logits_backward_, signature, constants, launch.ROW_OPTIONS)
    signature = {"part_ptr": "*fp32", "target_ptr": "*i64"} | _pointers(
        "logprob_ptr entropy_ptr lse_ptr", "*fp32"
    )
    signature |= _pointers("n parts", "i32")
    yield Case(
        "merge_stats", logits.merge_stats, signature, {"BLOCK": launch.MERGE_BLOCK}, launch.MERGE_OPTIONS
    )


def _token_cases() -> Iterator[Case]:
    signature = (
        _pointers("new_ptr old_ptr adv_ptr", "*fp32")
        | {"mask_ptr": "*i1"}
        | _pointers("ref_ptr rollout_ptr ent_ptr grad_ptr part_ptr", "*fp32")
        | {"n": "i32"}
        | _pointers("inv_denom low high dual_clip tis_cap kl_beta ent_coef", "fp32")
    )
    for name, everything in (("plain", False), ("full", True)):
        constants = dict.fromkeys(("HAS_DUAL", "HAS_TIS", "HAS_ROLLOUT", "HAS_ENT"), everything)
        constants |= {"TIS_MASK": False, "KL": 3 * everything}
        constants |= {"BLOCK": launch.DAPO_BLOCK, "WIDTH": launch.DAPO_WIDTH}
        yield Case(f"dapo_loss-{name}", dapo_loss.dapo_loss, signature, constants, launch.DAPO_OPTIONS)
    constants = {"SUMS": 17, "ROWS": launch.DAPO_REDUCE_ROWS, "WIDTH": launch.DAPO_WIDTH}
    signature = _pointers("part_ptr out_ptr loss_ptr", "*fp32") | {"programs": "i32", "inv_denom": "fp32"}
    yield Case("dapo_loss-reduce", dapo_loss.reduce_parts, signature, constants, launch.DAPO_OPTIONS)
    block: dict[str, Any] = {"BLOCK": launch.SEGMENT_BLOCK}
    signature = {
        "value_ptr": "*fp32",
        "mask_ptr": "*i1",
        "cu_ptr": "*i32",
        "sum_ptr": "*fp32",
        "count_ptr": "*fp32",
    }
    yield Case("segment_sum", segment_sum.segment_sum, signature, block, launch.SEGMENT_OPTIONS)
    signature = {"grad_ptr": "*fp32", "mask_ptr": "*i1", "cu_ptr": "*i32", "out_ptr": "*fp32"}
    yield Case("segment_sum-spread", segment_sum.segment_spread, signature, block, launch.SEGMENT_OPTIONS)
    signature = {"table_ptr": "*i64", "block_ptr": "*i32", "value_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    constants = {"BLOCK": launch.FP8_BLOCK, "FIELDS": launch.FP8_FIELDS, "ALIGNED": True, "ROUND": False}
    yield Case("pack_fp8_blocks", fp8_blocks.pack_fp8_blocks, signature, constants, launch.FP8_OPTIONS)


def cases() -> list[Case]:
    return [*_matrix_cases(), *_row_cases(), *_token_cases()]


# Never a multiple of 16 by contract; strides and sizes of real models are (V = 151936, H = 2048).
ODD = {"real", "vocab_start", "first_column", "programs", "parts"}


def compile_case(case: Case) -> Any:
    """Triton's compiled kernel."""
    signature = case.signature | dict.fromkeys(case.constants, "constexpr")
    order = {name: signature[name] for name in case.kernel.arg_names}
    unknown = ODD | {p.name for p in case.kernel.params if p.do_not_specialize}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(order.items())
        if kind.startswith("*") or (kind == "i32" and name not in unknown)
    }
    source = ASTSource(case.kernel, signature=order, constexprs=case.constants, attrs=aligned)
    return triton.compile(source, target=TARGET, options=case.options)


def _cuobjdump(cubin: bytes, *flags: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def loops(sass: str) -> list[list[str]]:
    """Bodies of the loops of a SASS listing: the instructions between a backward branch and its target."""
    listing = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)]
    bodies = []
    for address, text in listing:
        found = re.search(r"BRA\S*.*?`?\(?(0x[0-9a-f]+)", text)
        if found and int(found[1], 16) < address:
            start = int(found[1], 16)
            bodies.append([t for a, t in listing if start <= a <= address])
    return bodies


def facts(compiled: Any) -> Facts:
    sass, ptx = _cuobjdump(compiled.asm["cubin"], "-sass"), compiled.asm["ptx"]
    usage = _cuobjdump(compiled.asm["cubin"], "-res-usage")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    matrix = [body for body in loops(sass) if _count(body, "HGMMA") and not _count(body, "MUFU.EX2")]
    return Facts(
        registers=registers, stack=stack, shared=compiled.metadata.shared,
        threads=32 * compiled.metadata.num_warps, hgmma=sass.count("HGMMA"),
        hmma=len(re.findall(r"\bHMMA", sass)), tma_loads=sass.count("UTMALDG"),
        wide_loads=len(re.findall(r"LDG\.E\S*\.128", sass)),
        local_in_matrix_loop=sum(_count(body, "LDL") + _count(body, "STL") for body in matrix),
        atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
    )  # fmt: skip


def _count(body: list[str], word: str) -> int:
    return sum(word in text for text in body)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("redone_kernels.aot: unset TRITON_INTERPRET, the interpreter compiles nothing")
    wanted = [a for a in sys.argv[1:] if not a.startswith("-")]
    table = {c.name: asdict(facts(compile_case(c))) for c in cases() if not wanted or c.name in wanted}
    text = json.dumps(table, indent=1) + "\n"
    if "--write" in sys.argv:
        kept = json.loads(GOLDEN.read_text()) if wanted else {}
        GOLDEN.write_text(json.dumps(kept | table, indent=1) + "\n")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
