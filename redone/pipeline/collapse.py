"""Notices a policy that has collapsed: what a rising reward can hide."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from redone.config.schema import CollapseConfig


class CollapseWatch:
    """Counts, per sign of collapse, for how many steps in a row it held."""

    def __init__(self, tasks: Collection[str], cfg: CollapseConfig) -> None:
        """`tasks`: classification tasks, the ones of which one answer to everything is a failure."""
        self._tasks, self._cfg = tuple(sorted(tasks)), cfg
        self._runs: dict[str, int] = {}
        self._first_entropy: float | None = None

    def step(self, metrics: Mapping[str, float]) -> list[str]:
        """One sentence for every sign that has now held for cfg.steps steps. A step without the metric of a
        sign does not count for it."""
        if self._cfg.action == "off":
            return []
        said = []
        for sign, sentence, holds in self._signs(metrics):
            self._runs[sign] = self._runs.get(sign, 0) + 1 if holds else 0
            if self._runs[sign] == self._cfg.steps:
                said.append(sentence)
        return said

    def _signs(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str, bool]]:
        """(name, sentence, whether it holds now)."""
        cfg = self._cfg
        for task in self._tasks:
            if (share := metrics.get(f"rollout/{task}/common_answer_share")) is not None:
                sentence = (
                    f"task {task} has collapsed: one answer took {cfg.share:.0%} or more of its rollouts for "
                    f"{cfg.steps} steps. Balance the batches (data.balance_key), lower trainer.optim.lr, or "
                    "raise algorithm.entropy_coeff"
                )
                yield f"share of {task}", sentence, share >= cfg.share
        if (entropy := metrics.get("actor/entropy")) is not None:
            if self._first_entropy is None:
                self._first_entropy = entropy
            sentence = (
                f"the policy's entropy was below {cfg.entropy_share:.0%} of its first value "
                f"({self._first_entropy:.3g} nat) for {cfg.steps} steps, now {entropy:.3g}. Raise "
                "algorithm.entropy_coeff or lower trainer.optim.lr"
            )
            yield "entropy", sentence, entropy < cfg.entropy_share * self._first_entropy
        if (kl := metrics.get("actor/kl_loss")) is not None:
            sentence = (
                f"the policy is {kl:.3g} nat per token from its initial weights, above "
                f"evaluate.collapse.max_kl={cfg.max_kl:g} for {cfg.steps} steps. Raise algorithm.kl.coef or "
                "lower trainer.optim.lr"
            )
            yield "kl", sentence, kl > cfg.max_kl
