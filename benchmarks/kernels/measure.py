"""Timing, peak memory and the record every result carries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

REPO = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("REDONE_RESULTS", REPO / "benchmarks" / "results"))
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")


def commit() -> str:
    """Short hash of a clean tree; SystemExit otherwise: a result without a commit is worth nothing.

    A copy of the tree that came without its history may name its commit in REDONE_COMMIT.
    """
    if not (REPO / ".git").exists() and (named := os.environ.get("REDONE_COMMIT")):
        return named[:10]

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"benchmarks: git {words[0]} failed, no commit to record (a copy without history names it in"
                f" REDONE_COMMIT): {done.stderr.strip()}"
            )
        return done.stdout.strip()

    head = git("rev-parse", "--short=10", "HEAD")
    if dirty := git("status", "--porcelain"):
        raise SystemExit(f"benchmarks: the tree has uncommitted changes, commit them first:\n{dirty}")
    return head


def warm_up(seconds: float = 2.0) -> None:
    """Matrix products until the clocks and the power limit have settled."""
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], repeats: int = 10, warmups: int = 3) -> float:
    """Median device time of one call; the caches of a previous call are flushed by 256 MB of writes.

    The writes also keep the device busy while the host enqueues the call: launches are not timed unless they
    take longer.
    """
    flush = torch.empty(64 * 2**20, dtype=torch.float32, device="cuda")
    for _ in range(warmups):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def back_to_back(call: Callable[[], Any], count: int = 100, repeats: int = 5) -> float:
    """Median device time of one of `count` calls in a row, caches warm: for what takes microseconds."""
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / count)
    return median(times)


def peak_mib(call: Callable[[], Any]) -> float:
    """Device memory a call needs beyond what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write(head: str, rows: list[dict[str, Any]], targets: list[dict[str, Any]]) -> Path:
    """benchmarks/results/<device>-<date>-<commit>.json (folder: REDONE_RESULTS where set)."""
    device = torch.cuda.get_device_name().replace(" ", "-")
    record = {
        "device": device, "date": date.today().isoformat(), "commit": head, "versions": _versions(),
        "cuda": torch.version.cuda, "python": sys.version.split()[0], "command": " ".join(sys.argv),
        "targets": targets, "rows": rows,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{device}-{record['date']}-{head}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    return file
