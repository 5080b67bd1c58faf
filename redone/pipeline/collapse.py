"""Notices a policy that gives one answer to everything: the failure that a rising reward can hide."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from redone.config.schema import CollapseConfig


class CollapseWatch:
    """Of classification tasks: how many steps in a row one answer took (nearly) all rollouts."""

    def __init__(self, tasks: Collection[str], cfg: CollapseConfig) -> None:
        self._tasks, self._cfg = tuple(sorted(tasks)), cfg
        self._run: dict[str, int] = dict.fromkeys(self._tasks, 0)

    def step(self, metrics: Mapping[str, float]) -> list[str]:
        """Tasks whose run of such steps has just reached cfg.steps. Steps without a task do not count."""
        if self._cfg.action == "off":
            return []
        fallen = []
        for task in self._tasks:
            share = metrics.get(f"rollout/{task}/common_answer_share")
            if share is None:
                continue
            self._run[task] = self._run[task] + 1 if share >= self._cfg.share else 0
            if self._run[task] == self._cfg.steps:
                fallen.append(task)
        return fallen
