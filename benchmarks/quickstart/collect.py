"""Collect quickstart runs of several seeds into one result file.

    C=configs/quickstart/smollm2.yaml
    redone run $C run.name=seed0
    redone run $C run.name=seed1 run.seed=1 evaluate.before_train=false 'evaluate.baselines=[]'
    python benchmarks/quickstart/collect.py runs/seed0 runs/seed1 ... --out benchmarks/results/NAME.json

The first run must hold the untrained model's evaluation and the baselines: greedy decoding of the same model
on the same items gives the same answers whatever the seed, so the other runs may leave them out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from redone.bench.result import commit_of, require_clean
from redone.bench.roofline import processor
from redone.evaluate.compare import compare
from redone.evaluate.runner import Evaluation, read_evaluation
from redone.record.summary import read_summary

OTHERS = ("test-before", "baseline-constant", "baseline-label_logprob", "baseline-label_logprob_calibrated")


def result_of(run: Path, references: dict[str, Evaluation]) -> dict[str, Any]:
    after = read_evaluation(run / "evals" / "test-after.jsonl")
    summary = read_summary(run / "summary.json")
    overall = after.summary()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": yaml.safe_load((run / "config.yaml").read_text())["run"]["seed"],
        "n": overall.n,
        "accuracy": overall.accuracy,
        "interval": overall.interval,
        "per_class": overall.per_class,
        "format_errors": overall.format_errors,
        "best_step": summary.best_step,
        "seconds": summary.seconds,
        "steps": summary.steps,
        "canary_max_abs_diff": max(m.get("sync/canary_max_abs_diff", 0.0) for m in metrics),
        "seconds_per_step": sorted(m["timing_s/step"] for m in metrics if m["step"] > 0)[
            len(metrics) // 2 - 1
        ],
        "against": {name: asdict(compare(other, after)[0]) for name, other in references.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--note", default="", help="what else a reader must know, e.g. other load on the machine"
    )
    args = parser.parse_args()
    commit = commit_of()
    require_clean(commit, allow_dirty=False)
    references = {name: read_evaluation(args.runs[0] / "evals" / f"{name}.jsonl") for name in OTHERS}
    result = {
        "benchmark": "quickstart",
        "commit": commit.id,
        "device": processor(),
        "versions": dict(read_summary(args.runs[0] / "summary.json").versions),
        "note": args.note,
        "references": {name: asdict(e.summary()) for name, e in references.items()},
        "runs": [result_of(run, references) for run in args.runs],
    }
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for run in result["runs"]:
        worst = max(c["p_value"] for c in run["against"].values())
        print(
            f"seed {run['seed']}: {run['accuracy']:.3f} of {run['n']}, largest p {worst:.1e}, "
            f"{run['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
