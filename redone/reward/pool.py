"""All rewards of a run behind one coroutine. None is computed in the caller's process or loop.

Exact, metric and pattern rewards have a lane of worker processes per family; every sandbox and every reward
of the user's has its own, and a judge has a thread, so that a slow one holds up its own group and nothing
else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

import numpy as np

from redone.config.schema import (
    CustomReward,
    JudgeReward,
    RewardConfig,
    RewardPoolConfig,
    SandboxReward,
)
from redone.reward.jail import START_S as SANDBOX_START_S
from redone.reward.judge_lane import JudgeLane
from redone.reward.lane import GroupScores, Job, Lane
from redone.reward.worker import NO_IDS, make_reward
from redone.types import Completion, Prompt, Score

BATCH = 128  # jobs that cross the socket together
REMEMBERED = 4096  # prompts whose stripped copy is kept


class RewardPool:
    """Not bound to an event loop: every step of a run may have its own. Close it at the end."""

    def __init__(
        self, lanes: Mapping[str, Lane | JudgeLane], families: Mapping[str, str], max_pending: int
    ) -> None:
        """`lanes`: reward key -> lane. `families`: reward key -> name in the metrics."""
        self._lanes, self._families, self._max_pending = dict(lanes), dict(families), max_pending
        self._rooms: WeakKeyDictionary[asyncio.AbstractEventLoop, _Room] = WeakKeyDictionary()
        self._stripped: dict[int, tuple[Prompt, Prompt]] = {}

    async def score_group(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        """In the order of `completions`. Never raises for a bad sample: its Score says status != "ok"."""
        if not completions:
            return []
        loop = asyncio.get_running_loop()
        room = self._rooms.get(loop)
        if room is None:
            room = self._rooms[loop] = _Room(self._max_pending)
        async with room.take(len(completions)):
            group, key, lean = GroupScores(len(completions)), prompt.reward, self._strip(prompt)
            self._lanes[key].submit(
                [Job((key, lean, c.text, c.finish), group, i) for i, c in enumerate(completions)]
            )
            return await group.future

    def metrics(self) -> dict[str, float]:
        """Per family, since the last call: seconds per score, scores, failures, timeouts."""
        metrics: dict[str, float] = {}
        for lane in dict.fromkeys(self._lanes.values()):
            name = next(self._families[key] for key, other in self._lanes.items() if other is lane)
            found = lane.take_latency()
            if found.seconds or found.failed or found.timeouts:
                seconds = np.asarray(found.seconds or [0.0])
                metrics |= {
                    f"reward_latency/{name}/mean_s": float(seconds.mean()),
                    f"reward_latency/{name}/p95_s": float(np.quantile(seconds, 0.95)),
                    f"reward_latency/{name}/max_s": float(seconds.max()),
                    f"reward_latency/{name}/scores": float(len(found.seconds)),
                    f"reward_latency/{name}/failed": float(found.failed),
                    f"reward_latency/{name}/timeouts": float(found.timeouts),
                }
                metrics |= {f"reward_judge/{name}/{key}": count for key, count in found.counts.items()}
        return metrics

    def close(self) -> None:
        for lane in dict.fromkeys(self._lanes.values()):
            lane.close()

    def _strip(self, prompt: Prompt) -> Prompt:
        """Without token ids: rewards read texts, and prompts are long."""
        kept = self._stripped.get(id(prompt))
        if kept is not None and kept[0] is prompt:
            return kept[1]
        if len(self._stripped) >= REMEMBERED:
            self._stripped.clear()
        lean = Prompt(
            id=prompt.id,
            task=prompt.task,
            domain=prompt.domain,
            data_source=prompt.data_source,
            messages=prompt.messages,
            token_ids=NO_IDS,
            reference=prompt.reference,
            reward=prompt.reward,
            extra=prompt.extra,
        )
        self._stripped[id(prompt)] = (prompt, lean)
        return lean


class _Room:
    """For `limit` responses at once, in the order of asking; a larger group takes all of it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._places, self._turn = asyncio.Semaphore(limit), asyncio.Lock()

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        taken = 0
        try:
            async with self._turn:  # two groups that each hold half would wait for ever
                while taken < min(size, self._limit):
                    await self._places.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._places.release()


def build_rewards(configs: Mapping[str, RewardConfig], pool: RewardPoolConfig | None = None) -> RewardPool:
    """Raises ConfigError when a reward cannot work here: the user's file does not load, no sandbox."""
    pool = pool or RewardPoolConfig()
    lanes: dict[str, Lane | JudgeLane] = {}
    families: dict[str, str] = {}
    shared: dict[str, dict[str, RewardConfig]] = {}
    try:
        for key, config in configs.items():
            families[key] = config.family
            if isinstance(config, CustomReward):
                families[key] = f"custom-{key}"
                batch = BATCH if config.form == "trl" else 1
                lane = Lane({key: config}, workers=config.workers, batch=batch, timeout_s=config.timeout_s)
                lanes[key] = lane
                lane.start()
            elif isinstance(config, JudgeReward):
                families[key] = f"judge-{key}"
                lanes[key] = JudgeLane(config)
            elif isinstance(config, SandboxReward):
                families[key] = f"sandbox-{key}"
                _probe(config)
                limit = max(config.timeout_s, config.wall_s + SANDBOX_START_S)
                lanes[key] = Lane({key: config}, workers=config.workers, batch=1, timeout_s=limit)
            else:
                make_reward(config)
                shared.setdefault(config.family, {})[key] = config
    except BaseException:
        for started in lanes.values():
            started.close()
        raise
    for members in shared.values():
        limit = max(config.timeout_s for config in members.values())
        lane = Lane(members, workers=pool.workers, batch=BATCH, timeout_s=limit)
        lanes |= dict.fromkeys(members, lane)
    return RewardPool(lanes, families, pool.max_pending)


def _probe(config: SandboxReward) -> None:
    from redone.reward.sandbox import Sandbox

    Sandbox(config).probe()
