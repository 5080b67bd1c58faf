"""Writes redone/planner/holdout.txt: the published configurations that no constant of the planner is fitted
on.

Run once, before the first fit: python benchmarks/planner/choose_holdout.py POINTS_CSV >
redone/planner/holdout.txt Rule, without a look at any value: the families DeepSeek-V3, Qwen3-32B, Llama-70B
and Llama-405B as a whole (cross-family); of every other family (stack, model line, GPU) with n >= 2
configurations the max(1, round(n / 3)) whose SHA-256 comes first (in-family). A configuration is a row
without its release and its measured values, so all releases of one configuration are held out together.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections import defaultdict

CROSS = ("dsv3", "q32b", "l70b", "l405b")
LINES = {"q25_3b": "q25", "q25_7b": "q25"}
KEY = [
    *("stack", "model", "hw", "gpus", "mode", "tgpus", "ggpus", "tp", "pp", "ep", "cp", "vp", "gen_tp"),
    *("prompts", "samples", "gbs", "mb_tokens", "cap", "prec", "natural", "tune", "kind"),
]


def refused(row: dict[str, str]) -> bool:
    """Rows outside the planner's scope: FSDP, context parallelism on packed rows, hybrid models, incomplete
    rows."""
    fsdp = row["stack"] in ("prime", "automodel") or "fsdp" in row["id"] or "FSDP" in row["source"]
    packed_context = row["cp"] != "1" and ("long" in row["id"] or row["stack"] == "verl")
    return row["use"] != "1" or fsdp or packed_context


def main(path: str) -> None:
    families: dict[tuple[str, ...], dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if not refused(row):
                line = LINES.get(row["model"], row["model"])
                families[row["stack"], line, row["hw"]][tuple(row[k] for k in KEY)].append(row["id"])
    out = sys.stdout.write
    out("# Held-out published configurations (one a line: kind, then the rows of all its releases).\n")
    out("# Made by benchmarks/planner/choose_holdout.py before the first fit; never tuned on.\n")
    for (stack, line, hardware), configurations in sorted(families.items()):
        ordered = sorted(configurations, key=lambda key: hashlib.sha256(",".join(key).encode()).hexdigest())
        cross = line in CROSS
        count = len(ordered) if cross else max(1, round(len(ordered) / 3)) if len(ordered) > 1 else 0
        out(f"# {stack} {line} {hardware}: {count} of {len(ordered)} configurations\n")
        for key in ordered[:count]:
            out(f"{'cross' if cross else 'in'} {' '.join(configurations[key])}\n")


if __name__ == "__main__":
    main(sys.argv[1])
