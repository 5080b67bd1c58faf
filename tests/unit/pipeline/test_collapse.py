"""One answer to everything, for several steps in a row."""

from __future__ import annotations

from redone.config.schema import CollapseConfig
from redone.pipeline.collapse import CollapseWatch


def steps(watch: CollapseWatch, *shares: float) -> list[list[str]]:
    return [
        watch.step({"rollout/mood/common_answer_share": s, "rollout/free/common_answer_share": 1.0})
        for s in shares
    ]


def test_it_is_said_once_when_the_run_is_long_enough() -> None:
    watch = CollapseWatch(["mood"], CollapseConfig(share=0.9, steps=3))
    assert steps(watch, 0.95, 0.95, 0.5, 0.9, 1.0, 1.0, 1.0) == [[], [], [], [], [], ["mood"], []]


def test_steps_without_the_task_and_free_text_do_not_count() -> None:
    watch = CollapseWatch(["mood"], CollapseConfig(share=0.9, steps=2))
    assert watch.step({"rollout/mood/common_answer_share": 1.0}) == []
    assert watch.step({}) == []
    assert watch.step({"rollout/mood/common_answer_share": 1.0}) == ["mood"]


def test_it_can_be_switched_off() -> None:
    watch = CollapseWatch(["mood"], CollapseConfig(share=0.9, steps=1, action="off"))
    assert steps(watch, 1.0, 1.0) == [[], []]
