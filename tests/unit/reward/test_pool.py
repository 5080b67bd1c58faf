"""The pool: processes, order, back-pressure, and rewards that raise, hang or die."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rewarding import answer, prompt

from redone.config.schema import CustomReward, ExactReward, PatternReward, RewardPoolConfig
from redone.errors import ConfigError
from redone.reward.pool import RewardPool, build_rewards
from redone.types import Score

USER = str(Path(__file__).parent / "user_rewards.py")


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    found = build_rewards(
        {
            "exact": ExactReward(),
            "pattern": PatternReward(timeout_s=3),
            "user": CustomReward(path=USER, timeout_s=3),
            "trl": CustomReward(path=USER, name="trl", form="trl", timeout_s=3),
        },
        RewardPoolConfig(max_pending=64),
    )
    yield found
    found.close()


def score_all(pool: RewardPool, reward: str, texts: list[str], reference: object = "a") -> list[Score]:
    async def run() -> list[Score]:
        return await pool.score_group(prompt(reference, reward), [answer(t) for t in texts])

    return asyncio.run(run())


def test_scores_keep_their_order_over_many_batches(pool: RewardPool) -> None:
    texts = ["a" if i % 3 else str(i) for i in range(2000)]
    assert [s.raw for s in score_all(pool, "exact", texts)] == [float(t == "a") for t in texts]


def test_user_code_runs_elsewhere_and_its_numbers_come_back(pool: RewardPool) -> None:
    (score,) = score_all(pool, "user", ["a"])
    assert score.raw == 1 and score.parts["length"] == 1 and score.parts["pid"] != os.getpid()


def test_a_raising_reward_is_dropped_counted_and_logged(
    pool: RewardPool, caplog: pytest.LogCaptureFixture
) -> None:
    pool.metrics()
    with caplog.at_level(logging.ERROR):
        scores = score_all(pool, "user", ["a", "raise", "exit", "big", "a"])
    assert [s.status for s in scores] == ["ok", "error", "error", "error", "ok"]
    assert "ValueError: the user's bug" in caplog.text and "Traceback" in caplog.text
    metrics = pool.metrics()
    assert metrics["reward_latency/custom-user/failed"] == 3
    assert metrics["reward_latency/custom-user/scores"] == 5
    assert metrics["reward_latency/custom-user/max_s"] < 3


def test_a_dying_and_a_hanging_reward_lose_only_themselves(pool: RewardPool) -> None:
    pool.metrics()
    scores = score_all(pool, "user", ["a", "die", "a", "hang", "a"])
    assert [s.status for s in scores] == ["ok", "error", "ok", "timeout", "ok"]
    assert pool.metrics()["reward_latency/custom-user/timeouts"] == 1


def test_a_slow_reward_delays_only_its_group(pool: RewardPool) -> None:
    async def run() -> tuple[float, str]:
        slow = asyncio.create_task(pool.score_group(prompt("a", "user"), [answer("hang")]))
        start = time.monotonic()
        await pool.score_group(prompt("a", "exact"), [answer("a")] * 100)
        return time.monotonic() - start, (await slow)[0].status

    score_all(pool, "exact", ["warm"])
    seconds, status = asyncio.run(run())
    assert seconds < 2 and status == "timeout"


def test_trl_form_gets_batches_and_a_bad_one_is_found(pool: RewardPool) -> None:
    scores = score_all(pool, "trl", ["a", "b", "none", "a"])
    assert [(s.status, s.raw) for s in scores] == [("ok", 1), ("ok", 0), ("error", 0), ("ok", 1)]
    assert [s.status for s in score_all(pool, "trl", ["a", "hang"])] == ["ok", "timeout"]


def test_a_hanging_pattern_loses_only_itself(pool: RewardPool) -> None:
    checks = {"checks": [{"kind": "regex", "args": {"pattern": "(a+)+$", "full": True}}]}
    texts = ["aaa", "a" * 64 + "b", "b"]
    assert [s.status for s in score_all(pool, "pattern", texts, checks)] == ["ok", "timeout", "ok"]


def test_no_more_than_max_pending_are_queued() -> None:
    pool = build_rewards({"user": CustomReward(path=USER)}, RewardPoolConfig(max_pending=3))
    lane = pool._lanes["user"]
    highest = 0

    async def run() -> None:
        nonlocal highest
        tasks = [asyncio.create_task(pool.score_group(prompt("a", "user"), [answer("a")])) for _ in range(50)]
        while not all(task.done() for task in tasks):
            highest = max(highest, len(lane._queue))
            await asyncio.sleep(0)

    asyncio.run(run())
    pool.close()
    assert 0 < highest <= 3


def test_groups_share_the_room_and_a_larger_one_takes_all_of_it() -> None:
    pool = build_rewards({"user": CustomReward(path=USER)}, RewardPoolConfig(max_pending=3))

    async def run() -> list[list[Score]]:
        async def group(size: int) -> list[Score]:
            return await pool.score_group(prompt("a", "user"), [answer("ab"[i % 2]) for i in range(size)])

        late = asyncio.create_task(group(2))
        await asyncio.sleep(0)
        late.cancel()  # its places come back
        return await asyncio.wait_for(asyncio.gather(*map(group, (2, 5, 0, 2, 3))), 60)

    found = asyncio.run(run())
    pool.close()
    assert [[s.raw for s in scores] for scores in found] == [[1, 0], [1, 0, 1, 0, 1], [], [1, 0], [1, 0, 1]]


def test_what_cannot_work_is_refused_at_the_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    for config, message in (
        (CustomReward(path=str(tmp_path / "none.py")), "no such file"),
        (CustomReward(path=str(broken)), "ZeroDivisionError"),
        (CustomReward(path=USER, name="missing"), "has no function missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_rewards({"user": config})


def test_closing_ends_the_processes() -> None:
    pool = build_rewards({"user": CustomReward(path=USER)})
    lane = pool._lanes["user"]
    score_all(pool, "user", ["a"])
    processes = list(lane.processes)
    pool.close()
    assert len(processes) == 1 and processes[0]._process.poll() is not None
