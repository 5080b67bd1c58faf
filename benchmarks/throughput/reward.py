"""Scores per second of the reward pool and its parts.

    python benchmarks/throughput/reward.py --out benchmarks/results/throughput-reward-cpu.json

Prints one line per case: scores, wall seconds, scores per wall second, and per CPU second of all processes
(which is what to read on a machine that others use too).
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from record import Record, arguments

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
IN_LINE = tuple(CASES)
CASES["sandbox"] = (
    SandboxReward(), ("assert one() == 1",), "```python\ndef one(): return 1\n```"
)  # fmt: skip


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
    if isinstance(config, SandboxReward):
        config = config.model_copy(update={"workers": workers})
    pool = build_rewards({name: config}, RewardPoolConfig(workers=workers))
    groups = [make(name, reference, text, i) for i in range(4 if name == "sandbox" else 256)]

    async def round() -> int:
        found = await asyncio.gather(*(pool.score_group(p, answers) for p, answers in groups))
        return sum(score.status == "ok" and score.raw > 0 for scores in found for score in scores)

    asyncio.run(round())
    count, start, used = 0, time.perf_counter(), cpu()
    while time.perf_counter() - start < seconds:
        count += asyncio.run(round())
    wall = time.perf_counter() - start
    pool.close()  # only now the children's CPU time is known; it includes their start
    return report(f"pool {name}", count, wall, cpu() - used)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    record = Record(args, "sacrebleu")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    rates = [in_line(name, args.seconds) for name in IN_LINE]
    rates += [pooled(name, args.seconds, args.workers) for name in CASES]
    record.write({"rates": [asdict(rate) for rate in rates]})


if __name__ == "__main__":
    main()
