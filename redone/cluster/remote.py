"""Call many actors, join, and turn whatever went wrong into one sentence with actor, method and cause."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from redone.errors import RedoneError


@dataclass(frozen=True, slots=True)
class Peer:
    """An actor as the user knows it."""

    name: str  # "trainer rank 0", "engine 1"
    handle: Any
    log_path: str
    verdict: list[str] = field(default_factory=list)  # why the driver ended it (redone.cluster.health)

    def tail(self, lines: int = 3) -> str:
        """The last lines of its log, for an error message."""
        try:
            with open(self.log_path, errors="replace") as f:
                kept = [line.strip() for line in f if line.strip()]
        except OSError:
            return ""
        return " | ".join(line if len(line) <= 300 else f"{line[:300]}..." for line in kept[-lines:])


def explain(peer: Peer, method: str, error: RayError, kind: type[RedoneError]) -> RedoneError:
    """The RedoneError to raise for `error`: our own errors keep their type, others become `kind`."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, RedoneError):
            said = str(cause)
            return type(cause)(said if said.startswith(peer.name) else f"{peer.name}: {said}")
        return kind(
            f"{peer.name} failed in {method}: {type(cause).__name__}: {cause}. Traceback: {peer.log_path}"
        )
    if isinstance(error, RayActorError) and peer.verdict:
        return kind(f"{peer.verdict[-1]}. Log: {peer.log_path}")
    if isinstance(error, RayActorError):
        tail = peer.tail()
        return kind(
            f"{peer.name} died during {method}"
            + (f"; its last words: {tail}" if tail else "")
            + ". If these do not say why, the kernel may have ended it for want of memory (dmesg)"
            + f". Log: {peer.log_path}"
        )
    return kind(f"{peer.name} could not run {method}: {type(error).__name__}: {error}")


def join(
    peers: Sequence[Peer], refs: Sequence[Any], method: str, timeout_s: float, kind: type[RedoneError]
) -> list[Any]:
    """Results in order. The first failure is raised at once: its peers may hang in a collective forever."""
    index = {ref: i for i, ref in enumerate(refs)}
    results: list[Any] = [None] * len(refs)
    pending, deadline = list(refs), time.monotonic() + timeout_s
    errors: list[tuple[int, RayError]] = []
    while pending and not errors:
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            names = ", ".join(peers[index[r]].name for r in pending)
            raise kind(
                f"no answer to {method} in {timeout_s:.0f} s from {names}. Logs: beside {peers[0].log_path}"
            )
        # A rank that failed takes its peers down within moments: prefer the rank whose own code failed.
        more, pending = ray.wait(pending, num_returns=len(pending), timeout=0) if pending else ([], [])
        for ref in [*ready, *more]:
            try:
                results[index[ref]] = ray.get(ref)
            except (RayTaskError, RayActorError) as error:
                errors.append((index[ref], error))
    if errors:
        errors += _late_errors(pending, index)
        i, error = min(errors, key=lambda e: _blame(e[1]))
        raise explain(peers[i], method, error, kind) from None
    return results


def blame(
    peers: Sequence[Peer], error: RayError, refs: Sequence[Any], method: str, kind: type[RedoneError]
) -> RedoneError:
    """The error to raise when peers[0] failed with `error` while `refs` of the others run.

    The one that failed by itself says more than those that lost their connection to it.
    """
    index = {ref: i + 1 for i, ref in enumerate(refs)}
    i, worst = min([(0, error), *_late_errors(refs, index)], key=lambda e: _blame(e[1]))
    return explain(peers[i], method, worst, kind)


def _late_errors(pending: Sequence[Any], index: dict[Any, int]) -> list[tuple[int, RayError]]:
    """Errors of peers that arrive within a second of the first one."""
    late: list[tuple[int, RayError]] = []
    ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=1.0) if pending else ([], [])
    for ref in ready:
        try:
            ray.get(ref, timeout=0)
        except (RayTaskError, RayActorError) as error:
            late.append((index[ref], error))
        except GetTimeoutError:
            continue
    return late


def _blame(error: RayError) -> int:
    """0: our own refusal, 1: a dead process, 2: an exception, 3: a peer that only lost its connection."""
    if isinstance(error, RayActorError):
        return 1
    cause = getattr(error, "cause", None)
    if isinstance(cause, RedoneError):
        return 0
    return 3 if "onnection" in str(cause) else 2
