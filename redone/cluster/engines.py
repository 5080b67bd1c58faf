"""The driver's view of all rollout engines: routing, all-or-none weight updates, and engines that die."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from redone.api import Awake, TrainerPart
from redone.cluster.remote import Peer, explain, join
from redone.cluster.turns import Turns
from redone.config.schema import Config
from redone.errors import EngineDied, EngineError, RedoneError
from redone.types import CanaryReading, Completion, FloatArray, Sampling, WeightBucket, WeightPlan
from redone.weights.collective import elsewhere

log = logging.getLogger(__name__)

ALARM_S = 2.0  # between two looks at whether the run is lost
ABORT_S = 5.0  # for an engine to confirm that it dropped a request


@dataclass(frozen=True, slots=True)
class Held:
    """What every engine must hold now; its bytes stay in the channel until the next update."""

    plan: WeightPlan
    buckets: tuple[WeightBucket, ...]
    version: int


def died(error: BaseException) -> bool:
    """Whether the engine (or the actor around it) is gone, so that only a new one can answer."""
    return isinstance(error, RayActorError) or (
        isinstance(error, RayTaskError) and isinstance(error.cause, EngineDied)
    )


class RayEngineFleet:
    """redone.api.EngineFleet over Ray actors. A group stays on one engine: its prompt is prefilled once.

    An engine that dies is started again with the weights that all engines hold, and what it had not finished
    is asked again with the same seeds; after rollout.max_engine_restarts the run ends.

    generate may run in another thread than the rest, also during load: requests then wait in the engines.

    Args:
        start_again: (index, its dead peer) -> a new peer whose start() has returned.
        alarm: called while generation is waited for; raises when the run is lost anyway.
    """

    def __init__(
        self,
        cfg: Config,
        peers: Sequence[Peer],
        infos: Sequence[dict[str, Any]],
        start_again: Callable[[int, Peer], Peer],
        alarm: Callable[[], None],
    ) -> None:
        self.cfg, self.infos, self._alarm = cfg, infos, alarm
        self.peers = list(peers)
        self.in_flight = [0] * len(peers)
        self.restarts = 0
        self.held: Held | None = None  # None: the model folder's weights
        self.publish_again: Callable[[str], Callable[[], object]] | None = None  # RayTrainerGroup's
        self._again = itertools.count(1)
        self.turns: Turns | None = None  # trainer.offload
        self._start_again = start_again
        self._reviving: dict[int, Future[None]] = {}
        self._lost: BaseException | None = None  # why an engine could not be replaced
        self._lock = threading.Lock()
        self._weights = threading.Lock()  # held while the channel's bytes change, or are read by one engine
        self._resident = False  # within awake("all")
        self._threads = ThreadPoolExecutor(max(1, len(peers)), thread_name_prefix="revive")

    def _call(self, method: str, *args: Any, only: Sequence[int] | None = None) -> list[Any]:
        """One method on every engine (or those of `only`); engines that die are replaced and asked again."""
        self._settle()
        todo = list(range(len(self.peers)) if only is None else only)
        results: dict[int, Any] = {}
        while todo:
            lost = self._attempt(todo, method, args, results)
            for engine, peer in lost:
                self._revive(engine, peer).result()
            todo = [engine for engine, _ in lost]
        return [results[engine] for engine in sorted(results)]

    def _attempt(
        self, engines: Sequence[int], method: str, args: Sequence[Any], results: dict[int, Any]
    ) -> list[tuple[int, Peer]]:
        """Ask once; fills `results`, returns the engines that died. Raises on any other failure."""
        asked = [(e, self.peers[e]) for e in engines]
        refs = [peer.handle.call.remote(method, *args) for _, peer in asked]
        return [
            (engine, peer)
            for (engine, peer), ref in zip(asked, refs, strict=True)
            if not self._collect(engine, peer, ref, method, results)
        ]

    def _collect(self, engine: int, peer: Peer, ref: Any, method: str, results: dict[int, Any]) -> bool:
        """Whether the engine answered (into `results`); False when it died. Raises on any other failure."""
        try:
            results[engine] = ray.get(ref, timeout=self.cfg.trainer.timeout_s)
        except RayError as error:
            if not died(error):
                raise explain(peer, method, error, EngineError) from None
            log.warning("%s", explain(peer, method, error, EngineError))
            return False
        return True

    def _settle(self) -> None:
        """Wait for engines that are being replaced. Raises what made that impossible."""
        for future in list(self._reviving.values()):
            future.result()
        if self._lost is not None:
            raise self._lost

    def _revive(self, engine: int, dead: Peer) -> Future[None]:
        """Replace `dead` once, however many of its callers notice."""
        with self._lock:
            if self.peers[engine] is not dead:
                return self._reviving.get(engine, _done())
            if engine not in self._reviving:
                self._reviving[engine] = self._threads.submit(self._replace, engine, dead)
            return self._reviving[engine]

    def _replace(self, engine: int, dead: Peer) -> None:
        limit = self.cfg.rollout.max_engine_restarts
        try:
            if self.restarts >= limit:
                raise EngineError(
                    f"{dead.name} died, and rollout.max_engine_restarts={limit} restart(s) are used up; "
                    f"{dead.verdict[-1] if dead.verdict else dead.tail()}. Log: {dead.log_path}"
                )
            self.restarts += 1
            log.warning("%s is started again (%d of %d)", dead.name, self.restarts, limit)
            peer = self._start_again(engine, dead)
            with self._weights:
                self._restore(peer)
                self.peers[engine] = peer
        except BaseException as error:
            self._lost = error
            raise
        finally:
            with self._lock:
                del self._reviving[engine]

    def _restore(self, peer: Peer, last: Sequence[tuple[Any, ...]] = (("resume",),)) -> None:
        """Give an engine the weights that all hold, from the channel; then the calls `last`."""
        if (held := self.held) is None:
            return
        buckets, sent, channel = held.buckets, None, self.cfg.weights.channel
        if channel == "ipc":
            raise EngineError(
                f"{peer.name} was started again, and weights.channel=ipc keeps no copy of the weights for it;"
                " go on with --resume, or use weights.channel=shm"
            )
        if channel == "collective":
            assert self.publish_again is not None
            ranks = self.cfg.rollout.tensor_model_parallel_size
            location = elsewhere(buckets[0].location, f"again{next(self._again)}", ranks)
            buckets = tuple(replace(b, location=location) for b in buckets)
            sent = self.publish_again(location)
        steps: list[tuple[Any, ...]] = [("begin_update", held.plan)]
        steps += [("load", bucket) for bucket in buckets]
        for method, *args in [*steps, ("commit", held.version), *last]:
            ref = peer.handle.call.remote(method, *args)
            join([peer], [ref], method, self.cfg.trainer.timeout_s, EngineError)
        if sent is not None:
            sent()

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        """len(seeds) completions from the engine with the fewest sequences in flight.

        Cancelled, the engine drops the requests.
        """
        while True:
            engine = await self._pick()
            peer = self.peers[engine]
            self._count(engine, len(seeds))
            try:
                return await self._answer(peer.handle.call.remote("generate", prompt_ids, sampling, seeds))
            except (RayTaskError, RayActorError) as error:
                if not died(error):
                    raise explain(peer, "generate", error, EngineError) from None
                if peer is self.peers[engine] and engine not in self._reviving:
                    log.warning("%s", explain(peer, "generate", error, EngineError))
                self._revive(engine, peer)
            finally:
                self._count(engine, -len(seeds))

    def _count(self, engine: int, sequences: int) -> None:
        with self._lock:
            self.in_flight[engine] += sequences

    async def _answer(self, ref: Any) -> list[Completion]:
        future = asyncio.ensure_future(_awaited(ref))
        try:
            while True:
                done, _ = await asyncio.wait([future], timeout=ALARM_S)
                if done:
                    return future.result()
                self._alarm()
        except asyncio.CancelledError:
            ray.cancel(ref)
            done, _ = await asyncio.wait([future], timeout=ABORT_S)
            for ended in done:
                ended.exception()  # that it was cancelled is no news
            raise

    async def _pick(self) -> int:
        """The least busy engine that lives; waits when none does. Raises when one could not be replaced."""
        while True:
            if self._lost is not None:
                raise self._lost
            alive = [e for e in range(len(self.peers)) if e not in self._reviving]
            if alive:
                return min(alive, key=lambda e: self.in_flight[e])
            futures = [asyncio.wrap_future(f) for f in list(self._reviving.values())]
            if futures:
                await asyncio.wait(futures)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[FloatArray]]:
        return self._call("score", sequences)

    def canary(self, sequences: Sequence[Sequence[int]], probe: Sequence[int]) -> list[CanaryReading]:
        return self._call("canary", sequences, probe)

    def streams(self, engine: int, sequence: Sequence[int], cached: bool) -> dict[str, FloatArray]:
        found: dict[str, FloatArray] = self._call("streams", sequence, cached, only=[engine])[0]
        return found

    def load(self, plan: WeightPlan, buckets: Iterable[WeightBucket], version: int) -> None:
        """Engines load a bucket while the trainer gathers the next one, and stay paused until every one has
        committed; a failure raises and leaves them paused.

        An engine that dies meanwhile comes back with exactly these weights, so it takes no further part.
        """
        self._settle()
        everyone = list(range(len(self.peers)))
        lost = dict(self._attempt(everyone, "begin_update", (plan,), {}))
        while lost and self.cfg.weights.channel == "collective":  # its group needs them all
            for engine, peer in lost.items():
                self._revive(engine, peer).result()
            lost = dict(self._attempt(everyone, "begin_update", (plan,), {}))
        with self._weights:
            lost = self._load(plan, buckets, version, lost)
        for engine, peer in lost.items():
            self._revive(engine, peer).result()
        self._call("resume")

    def _load(
        self, plan: WeightPlan, buckets: Iterable[WeightBucket], version: int, lost: dict[int, Peer]
    ) -> dict[int, Peer]:
        """Up to commit; returns the engines that died, with those that were `lost` before."""
        arrived: list[WeightBucket] = []
        sent: list[tuple[int, Peer, Any]] = []
        for bucket in buckets:
            arrived.append(bucket)
            sent += [
                (e, peer, peer.handle.call.remote("load", bucket))
                for e, peer in enumerate(self.peers)
                if e not in lost
            ]
        self.held = Held(plan, tuple(arrived), version)
        cut_off: dict[int, RedoneError] = {}
        for engine, peer, ref in sent:
            if engine in lost or engine in cut_off:
                continue
            try:
                if not self._collect(engine, peer, ref, "load", {}):
                    lost[engine] = peer
            except RedoneError as error:
                cut_off[engine] = error
        # A group that loses a member fails as a whole: the others have to be served again.
        if cut_off and not (lost and self.cfg.weights.channel == "collective"):
            raise next(iter(cut_off.values()))
        for engine in cut_off:
            # What is left of the failed update must not arrive in the middle of the next one.
            left = [ref for e, _, ref in sent if e == engine]
            ray.wait(left, num_returns=len(left), timeout=self.cfg.trainer.timeout_s)
            self._restore(self.peers[engine], last=())
        complete = [e for e in range(len(self.peers)) if e not in lost and e not in cut_off]
        return lost | dict(self._attempt(complete, "commit", (version,), {}))

    @contextmanager
    def awake(self, what: Awake = "all") -> Iterator[None]:
        """Within awake("all") further ones change nothing."""
        if self._resident:
            yield
            return
        shared = self.turns if what == "all" else None
        with shared.phase("rollout") if shared else nullcontext():
            self._become(what)
            if shared:
                shared.look()
            self._resident = what == "all"
            try:
                yield
            finally:
                self._resident = False
            if shared:
                shared.look()
            self._become("none")

    def _become(self, part: TrainerPart) -> None:
        if self.turns is not None:
            self.turns.engines_become(part)
        self._call("sleep") if part == "none" else self._call("wake", part)

    def abandon(self) -> None:
        """Wait for replacements under way, which fail once their actors are killed."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        self._settle()
        refs = [p.handle.call.remote("close") for p in self.peers]
        join(self.peers, refs, "close", 30.0, EngineError)


async def _awaited(ref: Any) -> list[Completion]:
    completions: list[Completion] = await ref
    return completions


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
