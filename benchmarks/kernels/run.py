"""Times every kernel on this CUDA device and writes benchmarks/results/<device>-<date>-<commit>.json.

python benchmarks/kernels/run.py [rows of the head, default 8192]. Refuses a tree without a commit or with
changes.
"""

from __future__ import annotations

import logging
import sys

import heads
import tokens
import torch
from measure import commit, write

log = logging.getLogger("benchmarks")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    head = commit()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks: torch sees no CUDA device; results are those of a real run or none")
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
    rows = heads.bench(n) + tokens.bench()
    for row in rows:
        log.info("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    log.info("wrote %s", write(head, rows))


if __name__ == "__main__":
    main()
