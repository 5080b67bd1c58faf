"""All rewards of a run behind one coroutine; where a reward runs is decided here and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from redone.api import RewardFn
from redone.config.schema import CustomReward, ExactReward, RewardConfig
from redone.reward.custom import Custom
from redone.reward.exact import Exact
from redone.types import Completion, Prompt, Score


class RewardPool:
    """Cheap rewards run in line. The user's code runs in one thread of its own: one call at a time, and
    generation goes on meanwhile."""

    def __init__(self, inline: Mapping[str, RewardFn], threaded: Mapping[str, RewardFn]) -> None:
        self._inline = dict(inline)
        self._threaded = dict(threaded)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")

    async def score(self, prompt: Prompt, completion: Completion) -> Score:
        """Never raises for one bad sample: its Score says status != "ok"."""
        if prompt.reward in self._inline:
            return self._inline[prompt.reward].score(prompt, completion)
        reward = self._threaded[prompt.reward]
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, reward.score, prompt, completion
        )

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def build_rewards(configs: Mapping[str, RewardConfig]) -> RewardPool:
    """Raises ConfigError when a custom reward cannot be loaded."""
    exact = {key: Exact(config) for key, config in configs.items() if isinstance(config, ExactReward)}
    custom = {key: Custom(config) for key, config in configs.items() if isinstance(config, CustomReward)}
    return RewardPool(inline=exact, threaded=custom)
