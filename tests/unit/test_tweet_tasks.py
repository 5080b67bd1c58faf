"""The quickstart's eight tasks: answers to imitate earn their own reward, splits are disjoint."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redone.config.load import load_config
from redone.data.prompts import parse_row
from redone.data.tweet_tasks import PROMPTS, TURNS, task_rows
from redone.data.tweets import TOPIC_RULES, Tweet, split_of
from redone.reward.pool import build_rewards
from redone.types import Completion, Prompt

ROOT = Path(__file__).parents[2]
STARTS = ("my flight", "brady", "a driverless car", "my iphone", "coachella", "claritin")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    tweets = [
        Tweet(text=f"@Bob {start} is number {i} of many #tag{i % 7}", sentiment=mood, confidence=1.0)
        for i in range(60)
        for start in STARTS
        for mood in ("positive", "negative", "neutral")
    ]
    unique = {t.text + t.sentiment: t for t in tweets}
    tweets = [
        Tweet(text=f"{t.text} {t.sentiment[0]}", sentiment=t.sentiment, confidence=1.0)
        for t in unique.values()
    ]
    assert {s for t in tweets for s in [split_of(t.text)]} == {"train", "val", "test"} and len(
        TOPIC_RULES
    ) == 6
    return task_rows(tweets, {"train": 60, "val": 12, "test": 12}, 0, {("topic", "test"): 6})  # type: ignore[return-value]


def test_every_task_is_there_and_splits_are_disjoint(rows: dict[str, list[dict[str, Any]]]) -> None:
    texts = {split: {(r["task"], r["prompt"][-1]["content"]) for r in found} for split, found in rows.items()}
    assert {t for t, _ in texts["train"]} == set(PROMPTS)
    assert (
        not texts["train"] & texts["test"]
        and not texts["train"] & texts["val"]
        and not texts["val"] & texts["test"]
    )
    shown = {(task, question) for task, (_, examples) in PROMPTS.items() for question, _ in examples}
    assert not shown & (texts["train"] | texts["val"] | texts["test"])
    assert sum(TURNS.values()) == 16
    values = Counter(r["extra_info"]["balance"] for r in rows["train"])
    assert len(values) == 16
    labels = Counter(r["reward_model"]["ground_truth"] for r in rows["train"] if r["task"] == "topic")
    assert set(labels.values()) == {10} and len(labels) == 6


def test_right_answers_earn_their_reward_and_others_do_not(
    rows: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    cfg = load_config(ROOT / "configs/quickstart/pipeline.yaml")
    chosen = [next(r for r in rows["train"] if r["task"] == task) for task in PROMPTS]
    pool = build_rewards(cfg.rewards, cfg.reward_pool)

    async def score(row: dict[str, Any], text: str) -> float:
        parsed = parse_row(row, "here", cfg)
        prompt = Prompt(
            id="p", task=parsed.task, domain=parsed.domain, data_source="d", messages=parsed.messages,
            token_ids=np.zeros(1, np.int32), reference=parsed.reference, reward=parsed.reward,
            extra=parsed.extra,
        )  # fmt: skip
        done = Completion(
            token_ids=np.zeros(1, np.int32),
            text=text,
            logprobs=np.zeros(1, np.float32),
            finish="stop",
            versions=(),
        )
        (found,) = await pool.score_group(prompt, [done])
        assert found.status == "ok", found
        return found.raw

    def answer(row: dict[str, Any]) -> str:
        if row["task"] == "reply":
            return f"{row['reward_model']['ground_truth']} we are sorry to hear that #help"
        return str(row.get("response") or row["reward_model"]["ground_truth"])

    async def both() -> list[tuple[float, float]]:
        return [(await score(r, answer(r)), await score(r, "I am not sure what you mean")) for r in chosen]

    try:
        found = asyncio.run(both())
    finally:
        pool.close()
    assert {r["task"]: a for r, (a, _) in zip(chosen, found, strict=True)} == dict.fromkeys(PROMPTS, 1.0)
    assert all(wrong < 0.5 for _, wrong in found)
