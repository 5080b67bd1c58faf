"""The kernel tests can fail: each fault below, put into a copy, fails the test named beside it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETER

HEAD, ROWS, DAPO = "test_linear_logprob.py", "test_logits.py", "test_dapo_loss.py"
NO_START = "m = tl.full((BM,), NEG_INF, tl.float32)\n    s = tl.zeros((BM,)"
# file, what is there, what is put there, the test that must fail
FAULTS = {
    "columns past the end count": (
        "linear_logprob", "x = tl.where((c < hi)[None, :], x, NEG_INF)", "x = x",
        f"{HEAD}::test_verl_out_of_range_columns",
    ),
    "head's maximum starts at 0": (
        "linear_logprob", NO_START, NO_START.replace("NEG_INF", "0.0"),
        f"{HEAD}::test_verl_logits_near_minus_300",
    ),
    "rows' maximum starts at 0": (
        "logits", "m = tl.full((BLOCK,), NEG_INF, tl.float32)", "m = tl.full((BLOCK,), 0.0, tl.float32)",
        f"{ROWS}::test_verl_logits_far_from_zero",
    ),
    "clip bounds swapped": (
        "dapo_loss", "ratio > high, high, tl.where(ratio < low, low, ratio)",
        "ratio > 2.0 - low, 2.0 - low, tl.where(ratio < 2.0 - high, 2.0 - high, ratio)",
        f"{DAPO}::test_clip_high_is_higher",
    ),
    "mask multiplied, not selected": (
        "dapo_loss", "return tl.where(mask, tl.load(x + offsets, mask=keep, other=0.0).to(tl.float32), 0.0)",
        "return mask.to(tl.float32) * tl.load(x + offsets, mask=keep, other=0.0).to(tl.float32)",
        f"{DAPO}::test_nothing_selected",
    ),
    "dual clip on every advantage": (
        "dapo_loss", "dual = (adv < 0) & (pg > ceiling)", "dual = pg > ceiling",
        f"{DAPO}::test_dual_clip_bounds_negative_advantages_only",
    ),
    "32-bit row offsets": (
        "logits", "r = tl.program_id(0).to(tl.int64)\n    j", "r = tl.program_id(0)\n    j",
        f"{ROWS}::test_rows_beyond_2_31_elements",
    ),
    "ignored rows keep a gradient": (
        "logits", "(c < real) & (target >= 0)", "(c < real)", f"{ROWS}::test_backward",
    ),
    "entropy's shift dropped in the merge": (
        "logits", "(bi + si * shift_i) * keep_i", "bi * keep_i", f"{ROWS}::test_shapes",
    ),
}  # fmt: skip


CRASH = "32-bit row offsets"  # reads 4 GB before its rows: the interpreter's process may die of it


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, repo: Path, tmp_path: Path) -> None:
    module, old, new, test = FAULTS[name]
    shutil.copytree(repo / "kernels/redone_kernels", tmp_path / "redone_kernels")
    file = tmp_path / "redone_kernels/jit" / f"{module}.py"
    text = file.read_text()
    assert old in text, f"{file.name} no longer holds {old!r}"
    file.write_text(text.replace(old, new))
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore",
            "-o", f"pythonpath={tmp_path} {repo}", f"tests/kernels/{test}",
        ],
        cwd=repo,
        env=os.environ | INTERPRETER | {"PYTHONPATH": f"{tmp_path}:{repo}"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    if name == CRASH and done.returncode == -signal.SIGSEGV:
        return
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]
    assert " failed" in done.stdout and " error" not in done.stdout
