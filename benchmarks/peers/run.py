"""The same RL step in TRL's GRPOTrainer and in redone, on this CPU, timed in turn.

    benchmarks/peers/setup.sh VENV                       # TRL's own environment
    python benchmarks/peers/run.py --trl VENV/bin/python --out benchmarks/results/peers-trl-cpu.json

Both sides: SmolLM2-135M-Instruct in fp32, the same tweets in the same order with the same tokens, group size
G, every response exactly R tokens, DAPO loss, one optimizer step per batch, so no old log-probability pass
and no reference in either; AdamW, gradient clip 1. Each keeps its processes; while one works, the other
waits. Both may use all cores. TRL generates with transformers' generate (its vLLM mode wants a GPU); redone's
seconds contain the weight update of the engine and the canary, which TRL does not need.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from redone.bench.result import commit_of, require_clean
from redone.bench.roofline import processor

HERE = Path(__file__).parent
SETTINGS = {  # name -> prompts per step, group size, response tokens
    "short": (2, 16, 8),
    "long": (2, 16, 64),
    "smoke": (1, 2, 2),  # that both sides run; no result
}
DEFAULT = ("short", "long")
MEMORY_PERIOD_S = 0.5


@dataclass(slots=True)
class Side:
    """One worker process and what it said."""

    name: str
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    memory: float = 0.0  # bytes, peak over all its processes, shared pages counted once
    facts: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)

    def until(self, key: str) -> dict[str, Any]:
        """The next message with `key`; other messages are kept as facts."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("PEER "):
                said: dict[str, Any] = json.loads(line[5:])
                if key in said:
                    return said
                self.facts |= said
        raise SystemExit(f"{self.name} ended with code {self.process.wait()}; see its log")

    def step(self) -> None:
        assert self.process.stdin is not None
        with Memory(self):
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            self.last = self.until("seconds")
        self.seconds.append(self.last["seconds"])
        print(f"  {self.name}: {self.seconds[-1]:.1f} s, peak {self.memory / 1e9:.2f} GB", flush=True)

    def close(self) -> None:
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.terminate()


class Memory:
    """Watches the proportional set size of a side's process tree while it works."""

    def __init__(self, side: Side) -> None:
        self.side, self.done = side, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(MEMORY_PERIOD_S):
            root = psutil.Process(self.side.process.pid)
            total = 0.0
            for process in (root, *root.children(recursive=True)):
                try:
                    total += pss(process.pid)
                except (OSError, psutil.NoSuchProcess):
                    continue
            self.side.memory = max(self.side.memory, total)


def pss(pid: int) -> float:
    """Bytes; the kernel's own sum."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
        for line in file:
            if line.startswith("Pss:"):
                return float(line.split()[1]) * 1024
    return 0.0


def prepare(folder: Path, assets: Path, rows: int, args: argparse.Namespace, setting: str) -> Path:
    """The work file that both sides read."""
    prompts, samples, response = SETTINGS[setting]
    table = pq.read_table(assets / "tweets/sentiment/train.parquet").slice(0, rows)
    pq.write_table(table, folder / "train.parquet")
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for row in table.to_pylist():
            kept = {"prompt": row["prompt"], "label": row["reward_model"]["ground_truth"]}
            file.write(json.dumps(kept) + "\n")
    work = {
        "model": str(assets / "smollm2-135m-instruct"),
        "data": str(folder / "train.jsonl"),
        "data_parquet": str(folder / "train.parquet"),
        "prompts": prompts,
        "samples": samples,
        "response_tokens": response,
        "micro_batch": min(args.micro_batch, prompts * samples),
        "steps": args.warmup + args.repeats,
        "temperature": 0.8,
        "lr": 1e-6,
        "threads": len(os.sched_getaffinity(0)),
    }
    path = folder / "work.json"
    path.write_text(json.dumps(work, indent=1), encoding="utf-8")
    return path


def start(name: str, python: str, work: Path) -> Side:
    log = open(work.parent / f"{name}.log", "w", encoding="utf-8")  # noqa: SIM115 (the process writes into it)
    threads = str(len(os.sched_getaffinity(0)))
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    env |= {"OMP_NUM_THREADS": threads if name == "trl" else "1", "TORCH_COMPILE_DISABLE": "1"}
    if name == "trl":
        env.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        [python, str(HERE / f"worker_{name}.py"), str(work)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=env,
    )
    return Side(name=name, process=process)


def compare(args: argparse.Namespace, setting: str) -> dict[str, Any]:
    prompts, samples, response = SETTINGS[setting]
    rounds = args.warmup + args.repeats
    folder = Path(tempfile.mkdtemp(prefix=f"peers-{setting}-"))
    work = prepare(folder, args.assets, rounds * prompts, args, setting)
    print(f"{setting}: {prompts} prompts x {samples}, {response} tokens each; logs in {folder}", flush=True)
    sides: list[Side] = []
    try:
        for name, python in (("redone", sys.executable), ("trl", str(args.trl))):
            sides.append(start(name, python, work))
            sides[-1].until("ready")  # one after the other: starting is not measured
        ours, theirs = sides
        if ours.facts["prompt_tokens"] != theirs.facts["prompt_tokens"]:
            raise SystemExit("the two sides see different prompt tokens")
        for i in range(rounds):
            for side in sides if i % 2 == 0 else sides[::-1]:
                if i:
                    side.until("ready")
                side.step()
    finally:
        for side in sides:
            side.close()
    kept = {side.name: side.seconds[args.warmup :] for side in sides}
    medians = {name: statistics.median(seconds) for name, seconds in kept.items()}
    return {
        "prompts": prompts,
        "samples": samples,
        "response_tokens": response,
        "mean_prompt_tokens": statistics.mean(ours.facts["prompt_tokens"]),
        "seconds": kept,
        "medians": medians,
        "ratio": medians["trl"] / medians["redone"],
        "peak_bytes": {side.name: side.memory for side in sides},
        "redone_phases_last_step": ours.last["phases"],
        "trl_micro_batch": min(args.micro_batch, prompts * samples),
        "trl_last_log": theirs.facts.get("log", {}),
        "versions": {side.name: side.facts["versions"] for side in sides},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl", type=Path, required=True, help="python of TRL's environment")
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("REDONE_ASSETS", "assets")))
    parser.add_argument("--setting", choices=[*SETTINGS], action="append", help="default: short, long")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences of one TRL forward")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", default="", help="what else a reader must know, e.g. other load")
    parser.add_argument("--allow-dirty", action="store_true")
    args = parser.parse_args()
    commit = commit_of()
    require_clean(commit, args.allow_dirty)
    result: dict[str, Any] = {
        "benchmark": "peers: TRL GRPOTrainer against redone, one RL step",
        "commit": commit.id,
        "dirty": bool(commit.dirty),
        "device": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "warmup": args.warmup,
        "note": args.note,
        "settings": {},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.exists() and (before := json.loads(args.out.read_text()))["commit"] == commit.id:
        result["settings"] |= before["settings"]  # measured by an earlier call on the same code
    for name in args.setting or DEFAULT:
        load = os.getloadavg()[0]
        one = compare(args, name) | {"load_before": load, "load_after": os.getloadavg()[0]}
        result["settings"][name] = one
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        medians, peaks = one["medians"], one["peak_bytes"]
        print(
            f"{name}: redone {medians['redone']:.1f} s, TRL {medians['trl']:.1f} s: {one['ratio']:.2f} x; "
            f"memory {peaks['redone'] / 1e9:.2f} and {peaks['trl'] / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
