"""A process that scores batches for the pool: main() with a socket's descriptor as its argument.

It is started as a fresh interpreter, not by fork or spawn: the driver holds threads, and its main module may
be anything. It ends when the socket closes or its parent is gone, also while the user's code hangs.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from redone.api import RewardFn
from redone.config.schema import (
    CustomReward,
    ExactReward,
    MetricReward,
    PatternReward,
    RewardConfig,
    SandboxReward,
)
from redone.errors import ConfigError
from redone.types import Completion, Finish, Prompt, Score, ScoreStatus

# key of the reward, the prompt, text and finish of the completion: what rewards read, and quick to pickle
Task = tuple[str, Prompt, str, Finish]
NO_IDS = np.zeros(0, dtype=np.int32)
NO_LOGPROBS = np.zeros(0, dtype=np.float32)


# the fields of a Score in their order: a quarter of the time that pickling the object takes
Packed = tuple[float, float, bool, dict[str, float], str, ScoreStatus]


@dataclass(frozen=True, slots=True)
class Reply:
    packed: list[Packed]
    seconds: list[float]  # of each score
    log: list[tuple[str, int, str]]  # logger, level, message: written by the driver


def pack(score: Score) -> Packed:
    return score.raw, score.value, score.correct, dict(score.parts), score.detail, score.status


def unpack(packed: Packed) -> Score:
    raw, value, correct, parts, detail, status = packed
    return Score(raw=raw, value=value, correct=correct, parts=parts, detail=detail, status=status)


def make_reward(config: RewardConfig) -> RewardFn:
    """Raises ConfigError when it cannot work here."""
    if isinstance(config, ExactReward):
        from redone.reward.exact import Exact

        return Exact(config)
    if isinstance(config, MetricReward):
        from redone.reward.metric import Metric

        return Metric(config)
    if isinstance(config, PatternReward):
        from redone.reward.pattern import Pattern

        return Pattern(config)
    if isinstance(config, SandboxReward):
        from redone.reward.sandbox import Sandbox

        return Sandbox(config, ahead=True)
    assert isinstance(config, CustomReward)  # a judge is no RewardFn: reward/judge_lane.py
    from redone.reward.custom import Custom

    return Custom(config)


def score_batch(rewards: Mapping[str, RewardFn], tasks: Sequence[Task]) -> tuple[list[Score], list[float]]:
    """Scores and their seconds, in order. A reward with a batch form gets all its tasks at once."""
    from redone.reward.custom import Custom

    scores: list[Score] = []
    seconds: list[float] = []
    first = rewards[tasks[0][0]]
    if isinstance(first, Custom) and all(rewards[task[0]] is first for task in tasks):
        start = time.perf_counter()
        scores = first.score_many([task[1] for task in tasks], [completion_of(task) for task in tasks])
        return scores, [(time.perf_counter() - start) / len(tasks)] * len(tasks)
    for task in tasks:
        start = time.perf_counter()
        scores.append(rewards[task[0]].score(task[1], completion_of(task)))
        seconds.append(time.perf_counter() - start)
    return scores, seconds


def completion_of(task: Task) -> Completion:
    """As rewards see it: without tokens."""
    return Completion(token_ids=NO_IDS, text=task[2], logprobs=NO_LOGPROBS, finish=task[3], versions=())


class _Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> list[tuple[str, int, str]]:
        lines, self.lines = self.lines, []
        return lines


def serve(channel: Connection) -> None:
    """Receive the rewards' configurations, answer "" or why they cannot be built, then batch for batch."""
    collect = _Collect()
    logging.getLogger().addHandler(collect)
    configs: dict[str, RewardConfig] = channel.recv()
    try:
        rewards = {key: make_reward(config) for key, config in configs.items()}
    except ConfigError as error:
        channel.send(str(error))
        return
    channel.send("")
    while True:
        scores, seconds = score_batch(rewards, channel.recv())
        channel.send(Reply([pack(score) for score in scores], seconds, collect.take()))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it closes the socket
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    channel = Connection(int(sys.argv[1]))
    try:
        serve(channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
