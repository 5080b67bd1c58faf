"""Times every kernel on this CUDA device and writes benchmarks/results/<device>-<date>-<commit>.json.

python benchmarks/kernels/run.py [rows of the head, default 8192]. Refuses a tree without a commit or with
changes. `python benchmarks/kernels/table.py` puts the newest result into docs/kernels.md.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import heads
import tokens
import torch
from measure import commit, warm_up, write

log = logging.getLogger("benchmarks")


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels' targets beside what this run measured, each against a ceiling of this same run."""
    by = {row["name"]: row for row in rows}
    products = [by[f"ceiling/{name}"]["ms"] for name in ("logits-bf16", "dhidden", "dweight")]
    copy = by["ceiling/copy"]["TB_per_s"]
    return [
        {"what": what, "target": target, "measured": measured}
        for what, target, measured in (
            ("linear_logprob forward / bf16 matmul", ">= 0.75", products[0] / by["forward/ours-fused"]["ms"]),
            (
                "linear_dapo / its three matmuls",
                ">= 0.85",
                sum(products) / by["training/ours-linear_dapo"]["ms"],
            ),
            ("logits_stats / copy bandwidth", ">= 0.92", by["logits_stats"]["TB_per_s"] / copy),
            ("logits_backward_ / copy bandwidth", ">= 0.92", by["logits_backward_"]["TB_per_s"] / copy),
            ("dapo_loss at 65,536 tokens, us", "<= 6", by["dapo_loss-65536-warm"]["ms"] * 1e3),
        )
    ]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    head = commit()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks: torch sees no CUDA device; results are those of a real run or none")
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
    warm_up()
    rows = heads.bench(n) + tokens.bench()
    aims = targets(rows)
    for row in rows + aims:
        log.info("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    log.info("wrote %s", write(head, rows, aims))


if __name__ == "__main__":
    main()
