"""A stopped process is told from one that waits, named with phase and last event, and ended."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from redone.cluster.health import SUFFIX, Watch, interval
from redone.cluster.remote import Peer
from redone.config.schema import ExactReward
from redone.reward.lane import GroupScores, Job, Lane
from redone.types import Prompt, Score

PATIENCE_S = 60.0
BEATING = """
import subprocess, sys, time
from redone.cluster.health import Pulse
pulse = Pulse(sys.argv[1], 1.2, children=True)
pulse.event("update began")
if sys.argv[2:]:
    question = pulse.asking()  # kept: else it is closed
    question.__enter__()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""


class Actor:
    """A process with a pulse, and one child."""

    def __init__(self, log: Path, *words: str) -> None:
        self.peer = Peer("trainer rank 1", None, str(log))
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEATING, str(log), *words], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.child = int(self.process.stdout.readline())

    def wait_for(self, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not getattr(self, what)():
            assert time.monotonic() < deadline, f"not {what}"
            time.sleep(0.05)

    def end(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def beating(self) -> bool:
        return Path(self.peer.log_path + SUFFIX).exists()

    def condemned(self) -> bool:
        return bool(self.peer.verdict)


@pytest.fixture
def actor(tmp_path: Path) -> Iterator[Actor]:
    actor = Actor(tmp_path / "trainer-1.log")
    actor.wait_for("beating")
    yield actor
    actor.end()


@pytest.mark.parametrize("victim", ["itself", "its child"])
def test_a_stopped_process_is_named_and_ended(actor: Actor, victim: str) -> None:
    watch = Watch(lambda: [actor.peer], 1.2, 60.0, lambda: "update_actor")
    try:
        time.sleep(2.0)
        assert not actor.peer.verdict, "a healthy process must be left alone"
        os.kill(actor.process.pid if victim == "itself" else actor.child, signal.SIGSTOP)
        actor.wait_for("condemned")
    finally:
        watch.close()
    (verdict,) = actor.peer.verdict
    assert "trainer rank 1" in verdict and "phase update_actor" in verdict and "update began" in verdict
    assert (f"pid {actor.child}" in verdict) == (victim == "its child")
    assert actor.process.wait(timeout=PATIENCE_S) == -signal.SIGKILL


def test_a_loop_that_answers_nothing_is_named_and_ended(tmp_path: Path) -> None:
    """All processes run; the question to the loop stays open."""
    actor = Actor(tmp_path / "engine-0.log", "ask")
    watch = Watch(lambda: [actor.peer], 60.0, 1.5, lambda: "gen")
    try:
        actor.wait_for("condemned")
        assert actor.process.wait(timeout=PATIENCE_S) == -signal.SIGKILL
    finally:
        watch.close()
        actor.end()
    (verdict,) = actor.peer.verdict
    assert "has ended no step of its loop for" in verdict and "(cluster.stall_timeout_s=1.5)" in verdict
    assert "in phase gen; its last event: update began" in verdict


def test_what_a_dead_predecessor_left_condemns_nobody(actor: Actor, tmp_path: Path) -> None:
    """Its open question is in the file until the new process writes its own first sign of life."""
    peer = Peer("engine 0", None, str(tmp_path / "engine-0.log"))
    state = {"beat": 7, "event": "generate began", "since": 0.0, "pid": actor.process.pid, "stopped": [],
             "host": socket.gethostname(), "unanswered_s": 500.0}  # fmt: skip
    watch = Watch(lambda: [], 60.0, 300.0, lambda: "gen")
    for now, beat, condemned in ((0.0, 7, False), (5.0, 7, False), (10.0, 8, True)):
        Path(peer.log_path + SUFFIX).write_text(json.dumps(state | {"beat": beat}))
        watch.look(peer, now)
        assert bool(peer.verdict) == condemned, now
    watch.close()


def test_the_message_is_there_within_the_minute() -> None:
    """Default configuration: silence of 45 s, looked for every 5 s, written every 5 s."""
    from redone.config.schema import ClusterConfig

    timeout = ClusterConfig().health_timeout_s
    assert timeout + 2 * interval(timeout) <= 60


def test_a_stopped_reward_worker_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """The named recovery: its scores are computed by a new process, and the log says so."""
    lane = Lane({"default": ExactReward()}, workers=1, batch=8, timeout_s=2.0)
    lane.start()
    (process,) = lane.processes
    prompt = Prompt(
        id="p", task="t", domain="sns", data_source="d", messages=(), token_ids=np.zeros(0, np.int32),
        reference="yes", reward="default",
    )  # fmt: skip

    async def score() -> list[Score]:
        group = GroupScores(3)
        lane.submit([Job(("default", prompt, "yes", "stop"), group, i) for i in range(3)])
        return await group.future

    assert {s.status for s in asyncio.run(score())} == {"ok"}
    os.killpg(process._process.pid, signal.SIGSTOP)
    with caplog.at_level(logging.WARNING):
        scores = asyncio.run(score())
    assert [(s.status, s.correct) for s in scores] == [("ok", True)] * 3
    assert "default: " in caplog.text and "over 2 s" in caplog.text
    assert lane.processes and process not in lane.processes
    lane.close()
