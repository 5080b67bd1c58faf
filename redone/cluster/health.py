"""Signs of life: every actor rewrites a small file, the driver notices the one that stopped doing so.

A file, not a call: a rank inside a collective answers no calls, and a stopped process must be told from one
that waits. The file also carries the last event, for the message, and for how long an engine's loop has left
a question unanswered: its processes may all run and yet compute nothing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import ray

from redone.cluster.remote import Peer

log = logging.getLogger(__name__)

SUFFIX = ".beat"


def interval(timeout_s: float) -> float:
    """Seconds between two signs of life."""
    return min(5.0, max(0.2, timeout_s / 6))


class Pulse:
    """The actor's side: a thread that writes `<log>.beat` until the process ends."""

    def __init__(self, log_path: str, timeout_s: float, children: bool) -> None:
        """children: also report descendants that are stopped (an engine's own processes)."""
        self._path, self._interval, self._children = log_path + SUFFIX, interval(timeout_s), children
        self._beat = 0
        self._event, self._since = "started", time.time()
        self._asked: float | None = None
        threading.Thread(target=self._run, daemon=True, name="pulse").start()

    def event(self, text: str) -> None:
        self._event, self._since = text, time.time()

    @property
    def interval_s(self) -> float:
        return self._interval

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around a question to the engine's loop: the signs of life say for how long it is open."""
        self._asked = time.monotonic()
        try:
            yield
        finally:
            self._asked = None

    def _run(self) -> None:
        partial = f"{self._path}.partial"
        while True:
            self._beat += 1
            state = {
                "beat": self._beat,
                "event": self._event,
                "since": self._since,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "stopped": _stopped_descendants() if self._children else [],
                "unanswered_s": 0.0 if (asked := self._asked) is None else time.monotonic() - asked,
            }
            try:
                with open(partial, "w", encoding="utf-8") as file:
                    json.dump(state, file)
                os.replace(partial, self._path)
            except OSError as error:
                log.warning("no sign of life could be written: %s", error)
            time.sleep(self._interval)


def _stopped_descendants() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() == psutil.STATUS_STOPPED:
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


@dataclass(slots=True)
class _Seen:
    """What the driver knows of one actor, by the driver's own clock."""

    state: dict[str, Any]
    alive_at: float


class Watch:
    """The driver's side: a thread that ends a wedged actor and writes why into `Peer.verdict`.

    Ending it turns a hang into a death, which calls in flight report at once: trainers end the run, engines
    are started again.

    Args:
        peers: the actors of the moment (engines are replaced).
        timeout_s, stall_s: cluster.health_timeout_s, cluster.stall_timeout_s.
        phase: what the run is doing, for the message.
    """

    def __init__(
        self,
        peers: Callable[[], Sequence[Peer]],
        timeout_s: float,
        stall_s: float,
        phase: Callable[[], str],
    ) -> None:
        self._peers, self._timeout_s, self._stall_s, self._phase = peers, timeout_s, stall_s, phase
        self._seen: dict[int, _Seen] = {}  # by id of the peer object
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(interval(self._timeout_s)):
            for peer in self._peers():
                if not peer.verdict:
                    self.look(peer, time.monotonic())

    def look(self, peer: Peer, now: float) -> None:
        """Judge one actor at time `now` (monotonic seconds)."""
        state = _read(peer.log_path + SUFFIX)
        seen = self._seen.get(id(peer))
        if state is None:
            return  # it has not come up yet: its start has a deadline of its own
        moved = seen is None or (state["beat"], state["pid"]) != (seen.state["beat"], seen.state["pid"])
        if seen is None or (moved and not state["stopped"]):
            self._seen[id(peer)] = _Seen(state, now)
            # The first state seen may be what a dead predecessor left, or an older version's.
            open_s = state.get("unanswered_s", 0.0) if seen is not None else 0.0
            if open_s > self._stall_s and psutil_alive(state):
                what = f"has ended no step of its loop for {open_s:.0f} s (cluster.stall_timeout_s"
                self._condemn(peer, state, f"{what}={self._stall_s:g})")
            return
        seen.state = state
        if now - seen.alive_at > self._timeout_s and psutil_alive(state):
            what = f"shows no sign of life for {now - seen.alive_at:.0f} s (cluster.health_timeout_s"
            self._condemn(peer, state, f"{what}={self._timeout_s:g})")

    def _condemn(self, peer: Peer, state: Mapping[str, Any], what: str) -> None:
        who = f"a process of {peer.name} (pid {state['stopped'][0]})" if state["stopped"] else peer.name
        verdict = (
            f"{who} {what} in phase {self._phase()}; its last event: {state['event']}, "
            f"{time.time() - state['since']:.0f} s ago. It was ended"
        )
        peer.verdict.append(verdict)
        log.error("%s", verdict)
        if state["host"] == socket.gethostname():
            psutil.Process(state["pid"]).kill()  # a stopped process hears nothing else
        else:
            ray.kill(peer.handle)


def psutil_alive(state: Mapping[str, Any]) -> bool:
    """Whether the process may still live; a dead one is reported by Ray itself."""
    return state["host"] != socket.gethostname() or psutil.pid_exists(state["pid"])


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return None
    return content
