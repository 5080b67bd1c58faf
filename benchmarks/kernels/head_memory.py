"""Peak resident memory of a head's forward and backward on CPU, whole logits against the chunked backend.

python benchmarks/kernels/head_memory.py [N] [V] [H] [chunk]: each head in a process of its own; prints one
JSON object with the prediction beside each figure, and predictions for 32,768 rows. The peak is what the
process grows by beyond its inputs, gradients included. Needs Linux. The committed result:
PYTHONPATH=kernels python benchmarks/kernels/head_memory.py > benchmarks/results/head-memory-cpu.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from redone_kernels.linear_logprob import linear_logprob
from torch import Tensor

DEFAULT = (2048, 151936, 64, 64)


def resident() -> int:
    """Bytes resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def predicted(kind: str, n: int, v: int, h: int, chunk: int, *, bf16: bool = False) -> float:
    """Peak bytes beyond inputs and gradients, one rank, entropy included.

    naive: five fp32 copies of the logits (log-softmax, its exponential, their product, two gradients).
    chunked, fp32 on CPU: a chunk's logits and two copies in the reference; bf16 (on CUDA): fp32 logits and
    the bf16 gradient beside them. fused: an eighth of a chunk's gradient. All: rows of fp32 statistics; the
    weight's gradient is an output (Megatron's main_grad).
    """
    value = 2 if bf16 else 4
    rows = min(chunk, n)
    hidden = rows * h * (4 + value)  # a chunk's rows without the ignored ones, and their fp32 gradient
    if kind == "naive":
        return 5.0 * 4 * n * v
    if kind == "chunked":
        return rows * v * (4.0 + 2 if bf16 else 3 * 4.0) + hidden + 40.0 * n
    return rows * -(-v // 8) * float(value) + hidden + (8 * 16 + 24.0) * n


class Peak:
    """Largest resident size while the block runs, sampled every millisecond."""

    def __enter__(self) -> Peak:
        self.before = self.top = resident()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.top = max(self.top, resident())
            time.sleep(0.001)

    def __exit__(self, *unused: object) -> None:
        self.running = False
        self.thread.join()
        self.bytes = self.top - self.before


def head(kind: str, hidden: Tensor, weight: Tensor, target: Tensor, chunk: int) -> Tensor:
    """Forward and backward of log-probabilities and entropy; returns the log-probabilities."""
    if kind == "naive":
        logp = (hidden @ weight.T).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        logprob = logp.gather(1, target[:, None])[:, 0]
    else:
        out = linear_logprob(hidden, weight, target, entropy="grad", backend="chunked", chunk_tokens=chunk)
        logprob, entropy = out.logprob, out.entropy
    (logprob.sum() + entropy.sum() * 0.01).backward()
    return logprob.detach()


def measure(kind: str, n: int, v: int, h: int, chunk: int) -> dict[str, float]:
    torch.manual_seed(0)
    # what the first call of an operator imports is not the head's memory
    head(kind, torch.ones(2, h, requires_grad=True), torch.ones(3, h), torch.zeros(2, dtype=torch.int64), 1)
    hidden, weight = torch.randn(n, h) / h**0.5, torch.randn(v, h)
    target = torch.randint(0, v, (n,))
    hidden.requires_grad_(), weight.requires_grad_()
    start = time.monotonic()
    with Peak() as peak:
        logprob = head(kind, hidden, weight, target, chunk)
    return {
        "bytes": float(peak.bytes), "seconds": time.monotonic() - start,
        "logprob": float(logprob.double().sum()),
        "dhidden": float(hidden.grad.double().norm()), "dweight": float(weight.grad.double().norm()),
    }  # fmt: skip


def main() -> None:
    if len(sys.argv) == 6:
        sys.stdout.write(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))) + "\n")
        return
    sizes = [int(x) for x in sys.argv[1:]] + list(DEFAULT[len(sys.argv) - 1 :])
    table: dict[str, Any] = {}
    n, v, h, chunk = sizes
    for kind in ("naive", "chunked"):
        done = subprocess.run(
            [sys.executable, __file__, kind, *map(str, sizes)], capture_output=True, text=True, check=True
        )
        table[kind] = json.loads(done.stdout)
        table[kind]["predicted_bytes"] = predicted(kind, n, v, h, chunk) + 4.0 * (n + v) * h  # and gradients
    table["predicted_GiB_32768_rows_H_2048_chunk_1024"] = {
        name: round(predicted(kind, 32768, v, 2048, 1024, bf16=bf16) / 2**30, 2)
        for name, kind, bf16 in (
            ("naive, fp32", "naive", False),
            ("chunked, fp32 on CPU", "chunked", False),
            ("chunked, bf16 on CUDA", "chunked", True),
            ("fused, bf16 on CUDA", "fused", True),
        )
    }
    table["ratio"] = table["naive"]["bytes"] / table["chunked"]["bytes"]
    names = ("N", "V", "H", "chunk")
    sys.stdout.write(
        json.dumps({"torch": torch.__version__} | dict(zip(names, sizes, strict=True)) | table, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
