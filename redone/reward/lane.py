"""Worker processes of one kind of reward, the queue before them, and what to do when one hangs or dies."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from redone.config.schema import RewardConfig
from redone.errors import ConfigError, RedoneError
from redone.reward.worker import Reply, Task, unpack
from redone.types import Score

log = logging.getLogger(__name__)

START = "from redone.reward.worker import main; main()"
START_S = 120.0  # a worker imports numpy and pydantic, on a busy machine
# what pickle raises for a reference that cannot cross a process border
UNPICKLABLE = (pickle.PickleError, TypeError, AttributeError, ValueError)


class GroupScores:
    """The scores that one caller waits for. Belongs to that caller's event loop and its thread."""

    def __init__(self, size: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[Score]] = self.loop.create_future()
        self._scores: dict[int, Score] = {}
        self._size = size

    def put(self, index: int, score: Score) -> None:
        self._scores[index] = score
        if len(self._scores) == self._size and not self.future.done():
            self.future.set_result([self._scores[i] for i in range(self._size)])


@dataclass(frozen=True, slots=True)
class Job:
    task: Task
    group: GroupScores
    index: int  # within the group


@dataclass(slots=True)
class Latency:
    """Since the last look. Seconds are the worker's own, without queueing."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    timeouts: int = 0
    counts: dict[str, float] = field(default_factory=dict)  # what else is counted, since the start


class Process:
    """One worker process and the socket to it. Raises ConfigError when it cannot build its rewards."""

    def __init__(self, configs: Mapping[str, RewardConfig]) -> None:
        ours, theirs = socket.socketpair()
        number = theirs.fileno()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(number)],
                pass_fds=(number,),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                start_new_session=True,
            )
        self.channel = Connection(ours.detach())
        self.channel.send(dict(configs))
        try:
            problem = self.channel.recv() if self.channel.poll(START_S) else "no answer"
        except (EOFError, ConnectionResetError):
            problem = f"it ended at once, exit code {self._process.wait()}"
        if problem:
            self.kill()
            raise ConfigError(f"a reward worker did not start: {problem}")

    def kill(self) -> None:
        """With everything that the user's code may have started in its session."""
        self.channel.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Lane:
    """`workers` processes that score batches of at most `batch` jobs; a batch gets `timeout_s`.

    When a batch hangs or kills its process, a new process scores its jobs one by one, and only those that do
    it again are lost: status "timeout" or "error", never a zero.
    """

    def __init__(
        self, configs: Mapping[str, RewardConfig], *, workers: int, batch: int, timeout_s: float
    ) -> None:
        self._configs, self._batch, self._timeout_s = dict(configs), batch, timeout_s
        self._workers = workers
        self._queue: deque[Job] = deque()
        self._wake = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._first: Process | None = None
        self._closed = False
        self._latency = Latency()
        self.processes: set[Process] = set()

    def start(self) -> None:
        """Start one process now, so that a reward that cannot be built is known before the run."""
        self._first = Process(self._configs)
        self.processes.add(self._first)

    def submit(self, jobs: Sequence[Job]) -> None:
        with self._wake:
            self._queue.extend(jobs)
            self._wake.notify(len(jobs))
        for _ in range(min(len(jobs), self._workers - len(self._threads)) if not self._closed else 0):
            thread = threading.Thread(target=self._serve, daemon=True, name="reward-lane")
            self._threads.append(thread)
            thread.start()

    def take_latency(self) -> Latency:
        with self._wake:
            found, self._latency = self._latency, Latency()
        return found

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for process in list(self.processes):
            process.kill()
        self.processes.clear()

    def _serve(self) -> None:
        process: Process | None = None
        with self._wake:
            process, self._first = self._first, None
        while jobs := self._take():
            scores: list[Score]
            process, found = self._run(process, jobs)
            if found is not None:
                scores = found
            elif len(jobs) == 1:
                scores = [self._lost]
            else:
                scores = []
                for job in jobs:
                    process, single = self._run(process, [job])
                    scores.append(single[0] if single else self._lost)
            self._deliver(jobs, scores)

    def _take(self) -> list[Job]:
        """The next jobs; none when the lane is closed."""
        with self._wake:
            while not self._queue and not self._closed:
                self._wake.wait()
            if self._closed:
                return []
            # an even share, so that a burst does not end up with one worker
            share = -(-len(self._queue) // self._workers)
            return [self._queue.popleft() for _ in range(min(self._batch, share))]

    def _run(self, process: Process | None, jobs: Sequence[Job]) -> tuple[Process | None, list[Score] | None]:
        """(the process, or None when it had to be ended; the scores, or None with self._lost set)."""
        try:
            if process is None:
                process = Process(self._configs)
                self.processes.add(process)
            process.channel.send([job.task for job in jobs])
            if process.channel.poll(self._timeout_s):
                reply: Reply = process.channel.recv()
                for name, level, message in reply.log:
                    logging.getLogger(name).log(level, "%s", message)
                with self._wake:
                    self._latency.seconds += reply.seconds
                return process, [unpack(packed) for packed in reply.packed]
            self._lost = Score(
                raw=0.0, value=0.0, correct=False, status="timeout", detail=f"over {self._timeout_s:g} s"
            )
        except (EOFError, OSError, RedoneError, *UNPICKLABLE) as error:
            detail = f"the reward's process failed: {type(error).__name__} {error}"
            self._lost = Score(raw=0.0, value=0.0, correct=False, status="error", detail=detail)
        if process is not None:
            self.processes.discard(process)
            process.kill()
        if not self._closed:
            log.warning("%s: %d response(s), %s", "/".join(self._configs), len(jobs), self._lost.detail)
        return None, None

    def _deliver(self, jobs: Sequence[Job], scores: Sequence[Score]) -> None:
        with self._wake:
            self._latency.failed += sum(score.status == "error" for score in scores)
            self._latency.timeouts += sum(score.status == "timeout" for score in scores)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Score]]] = defaultdict(list)
        for job, score in zip(jobs, scores, strict=True):
            by_loop[job.group.loop].append((job, score))
        for loop, found in by_loop.items():
            with suppress(RuntimeError):  # closed: nobody waits any more
                loop.call_soon_threadsafe(_put, found)


def _put(found: Sequence[tuple[Job, Score]]) -> None:
    for job, score in found:
        job.group.put(job.index, score)
