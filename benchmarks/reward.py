"""Scores per second of the reward pool and its parts.

python benchmarks/reward.py [--seconds 5] [--workers 2] [--out FOLDER]

Prints one line per case: scores, wall seconds, scores per wall second, and per CPU second of all processes
(which is what to read on a machine that others use too). --out (benchmarks/results) writes the same as
reward-cpu.json; it wants a tree without uncommitted changes, so that the commit says what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from redone.config.schema import (
    Check,
    ExactReward,
    MetricReward,
    PatternReward,
    RewardConfig,
    RewardPoolConfig,
    SandboxReward,
)
from redone.reward.pool import build_rewards
from redone.reward.sandbox import Sandbox, Tests
from redone.reward.worker import make_reward
from redone.types import Completion, Prompt

GROUP = 16  # responses per prompt
EN = "The quick brown fox jumps over the lazy dog near the river bank on a sunny day."
ZH = "今天的天气真不错，我们一起去公园散步吧！记得带上相机，樱花已经开了。"
CHECKS = (
    Check(kind="regex", args={"pattern": r"<answer>.*</answer>"}, gate=True),
    Check(kind="forbidden", args={"words": ["sorry"]}),
    Check(kind="count", args={"unit": "words", "max": 60}),
)
CASES: dict[str, tuple[RewardConfig, Any, str]] = {
    "exact": (ExactReward(extract="tag"), "Paris", "I think so. <answer> paris. </answer>"),
    "pattern": (PatternReward(checks=CHECKS), "", f"{EN} <answer>x</answer>"),
    "bleu-en": (MetricReward(metrics=("bleu",)), EN, EN.replace("jumps", "leaps")),
    "bleu-zh": (MetricReward(metrics=("bleu",)), ZH, ZH.replace("公园", "河边")),
    "chrf-en": (MetricReward(metrics=("chrf",)), EN, EN.replace("jumps", "leaps")),
}


def make(reward: str, reference: Any, text: str, number: int) -> tuple[Prompt, list[Completion]]:
    ids = np.zeros(64, dtype=np.int32)
    prompt = Prompt(
        id=str(number),
        task="t",
        domain="sns",
        data_source="d",
        messages=(),
        token_ids=ids,
        reference=f"{reference} {number % 7}" if reward.startswith(("bleu", "chrf")) else reference,
        reward=reward,
    )
    logprobs = np.zeros(64, dtype=np.float32)
    answers = [
        Completion(
            token_ids=ids,
            text=f"{text} {i}"[: len(text) + 2 * (i > 7)],
            logprobs=logprobs,
            finish="stop",
            versions=(),
        )
        for i in range(GROUP)
    ]
    return prompt, answers


def cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@dataclass(frozen=True)
class Rate:
    case: str
    scores: int
    wall_s: float
    per_second: float
    per_cpu_second: float


def report(name: str, count: int, wall: float, used: float) -> Rate:
    rate = Rate(name, count, round(wall, 3), round(count / wall, 1), round(count / used, 1))
    print(
        f"{name:<16} {count:>8} {wall:8.2f} {rate.per_second:>10.0f}/s {rate.per_cpu_second:>10.0f}/cpu-s",
        flush=True,
    )
    return rate


def in_line(name: str, seconds: float) -> Rate:
    """The reward alone, in this process."""
    config, reference, text = CASES[name]
    reward = make_reward(config)
    groups = [make(name, reference, text, i) for i in range(64)]
    reward.score(groups[0][0], groups[0][1][0])
    count, start, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        prompt, answers = groups[count // GROUP % len(groups)]
        count += sum(reward.score(prompt, answer).status == "ok" for answer in answers)
    return report(name, count, time.perf_counter() - start, time.process_time() - used)


def pooled(name: str, seconds: float, workers: int) -> Rate:
    """Through the pool: worker processes, sockets, futures."""
    config, reference, text = CASES[name]
    pool = build_rewards({name: config}, RewardPoolConfig(workers=workers))
    groups = [make(name, reference, text, i) for i in range(256)]

    async def round() -> int:
        found = await asyncio.gather(*(pool.score_group(p, answers) for p, answers in groups))
        return sum(score.status == "ok" for scores in found for score in scores)

    asyncio.run(round())
    count, start, used = 0, time.perf_counter(), cpu()
    while time.perf_counter() - start < seconds:
        count += asyncio.run(round())
    wall = time.perf_counter() - start
    pool.close()  # only now the children's CPU time is known; it includes their start
    return report(f"pool {name}", count, wall, cpu() - used)


def sandbox(seconds: float, workers: int) -> Rate:
    box, tests = Sandbox(SandboxReward()), Tests(tests=("assert one() == 1",))
    count, start, used = 0, time.perf_counter(), cpu()
    with ThreadPoolExecutor(workers) as threads:
        while time.perf_counter() - start < seconds:
            done = threads.map(lambda _: box.score_program(tests, "def one(): return 1"), range(10))
            count += sum(score.correct for score in done)
    return report("sandbox", count, time.perf_counter() - start, cpu() - used)


def device() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def clean_commit() -> str:
    """Of the tree that is measured. SystemExit when it has uncommitted changes."""
    words = [["git", "status", "--porcelain"], ["git", "rev-parse", "HEAD"]]
    here = Path(__file__).parent
    dirty, head = (
        subprocess.run(w, cwd=here, capture_output=True, text=True, check=True).stdout for w in words
    )
    if dirty.strip():
        raise SystemExit(f"benchmarks: the tree has uncommitted changes, commit them first:\n{dirty}")
    return head.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    commit = clean_commit() if options.out else ""
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f}, Python {sys.version.split()[0]}")
    rates = [in_line(name, options.seconds) for name in CASES]
    rates += [
        pooled(name, options.seconds, options.workers) for name in ("exact", "pattern", "bleu-en", "bleu-zh")
    ]
    rates.append(sandbox(options.seconds, options.workers))
    if options.out:
        command = f"python benchmarks/reward.py --seconds {options.seconds:g} --workers {options.workers}"
        result = {
            "benchmark": "reward",
            "command": command,
            "commit": commit,
            "device": device(),
            "cores": os.cpu_count(),
            "load_before": round(load, 1),
            "load_after": round(os.getloadavg()[0], 1),
            "versions": {"python": sys.version.split()[0], "sacrebleu": metadata.version("sacrebleu")},
            "rates": [asdict(rate) for rate in rates],
        }
        text = json.dumps(result, indent=1) + "\n"
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "reward-cpu.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
