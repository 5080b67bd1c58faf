"""Collect runs of the three stages, one per seed, into one result file.

    C=configs/quickstart/pipeline.yaml
    redone run $C run.name=stages0
    redone run $C run.name=stages1 run.seed=1
    python benchmarks/quickstart/stages.py runs/stages0 runs/stages1 ... --out benchmarks/results/NAME.json

Prints, per task: scores of every seed, and the largest p of the last stage against the untrained model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from redone.bench.result import commit_of, require_clean
from redone.bench.roofline import processor


def result_of(run: Path) -> dict[str, Any]:
    nodes = {
        name: json.loads((run / folder / "node.json").read_text(encoding="utf-8"))
        for name, folder in json.loads((run / "current.json").read_text(encoding="utf-8")).items()
    }
    return {
        "seed": yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["run"]["seed"],
        "seconds": {name: node["seconds"] for name, node in nodes.items()},
        "total_seconds": round(sum(node["seconds"] for node in nodes.values()), 1),
        "facts": {name: node["facts"] for name, node in nodes.items()},
        "results": json.loads((run / "results.json").read_text(encoding="utf-8")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", default="", help="what else a reader must know, e.g. other load")
    args = parser.parse_args()
    commit = commit_of()
    require_clean(commit, allow_dirty=False)
    runs = [result_of(run) for run in args.runs]
    machine = json.loads((args.runs[0] / "machine.json").read_text(encoding="utf-8"))
    result = {
        "benchmark": "quickstart/stages", "commit": commit.id, "processor": processor(), **machine,
        "note": args.note, "runs": runs,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    first, *_, last = runs[0]["results"]["columns"]
    for task in runs[0]["results"]["tasks"]:
        stages = [
            " -> ".join(f"{cell['score']:.3f}" for cell in run["results"]["tasks"][task].values())
            for run in runs
        ]
        worst = max(run["results"]["tests"][task][last]["p_value"] for run in runs)
        print(f"{task:12} {'   '.join(stages)}   largest p against {first}: {worst:.1e}")
    print("seconds:", ", ".join(f"{run['total_seconds']:.0f}" for run in runs))


if __name__ == "__main__":
    main()
