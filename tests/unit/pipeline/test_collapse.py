"""Signs of collapse, each for several steps in a row."""

from __future__ import annotations

from redone.config.schema import CollapseConfig
from redone.pipeline.collapse import CollapseWatch


def steps(watch: CollapseWatch, *shares: float) -> list[int]:
    """How many sentences each step brings."""
    return [
        len(watch.step({"rollout/mood/common_answer_share": s, "rollout/free/common_answer_share": 1.0}))
        for s in shares
    ]


def values(watch: CollapseWatch, name: str, *series: float) -> list[list[str]]:
    return [watch.step({name: value}) for value in series]


def test_it_is_said_once_when_the_run_is_long_enough() -> None:
    watch = CollapseWatch(["mood"], CollapseConfig(share=0.9, steps=3))
    assert steps(watch, 0.95, 0.95, 0.5, 0.9, 1.0, 1.0, 1.0) == [0, 0, 0, 0, 0, 1, 0]


def test_steps_without_the_task_and_free_text_do_not_count() -> None:
    watch = CollapseWatch(["mood"], CollapseConfig(share=0.9, steps=2))
    assert watch.step({"rollout/mood/common_answer_share": 1.0}) == []
    assert watch.step({}) == []
    (sentence,) = watch.step({"rollout/mood/common_answer_share": 1.0})
    assert sentence.startswith("task mood has collapsed: one answer took 90%")


def test_entropy_is_held_against_the_first_step() -> None:
    watch = CollapseWatch([], CollapseConfig(entropy_share=0.1, steps=2))
    *silent, said = values(watch, "actor/entropy", 2.0, 0.3, 0.19, 0.21, 0.19, 0.1)
    assert silent == [[]] * 5 and "below 10% of its first value (2 nat)" in said[0]


def test_distance_from_the_initial_weights() -> None:
    watch = CollapseWatch([], CollapseConfig(max_kl=0.5, steps=2))
    *silent, said = values(watch, "actor/kl_loss", 0.6, 0.4, 0.6, 0.7)
    assert silent == [[]] * 3 and "evaluate.collapse.max_kl=0.5" in said[0]


def test_it_can_be_switched_off() -> None:
    watch = CollapseWatch(["mood"], CollapseConfig(share=0.9, steps=1, action="off"))
    assert steps(watch, 1.0, 1.0) == [0, 0]
    assert CollapseWatch([], CollapseConfig(entropy_share=0, steps=1)).step({"actor/entropy": 0.0}) == []
