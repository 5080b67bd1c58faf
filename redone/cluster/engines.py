"""The driver's view of all rollout engines: routing, all-or-none weight updates, sleep and wake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from redone.api import Awake
from redone.cluster.remote import Peer, explain, join
from redone.config.schema import Config
from redone.errors import EngineError
from redone.types import Completion, FloatArray, Sampling, WeightBucket, WeightPlan


class RayEngineFleet:
    """redone.api.EngineFleet over Ray actors. A group stays on one engine: its prompt is prefilled once."""

    def __init__(self, cfg: Config, peers: Sequence[Peer], infos: Sequence[dict[str, Any]]) -> None:
        self.cfg, self.peers, self.infos = cfg, peers, infos
        self.in_flight = [0] * len(peers)

    def _call(self, method: str, *args: Any) -> list[Any]:
        refs = [p.handle.call.remote(method, *args) for p in self.peers]
        return join(self.peers, refs, method, self.cfg.trainer.timeout_s, EngineError)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        """len(seeds) completions from the engine with the fewest sequences in flight."""
        engine = min(range(len(self.peers)), key=lambda e: self.in_flight[e])
        peer = self.peers[engine]
        self.in_flight[engine] += len(seeds)
        try:
            completions: list[Completion] = await peer.handle.call.remote(
                "generate", prompt_ids, sampling, seeds
            )
        except (RayTaskError, RayActorError) as error:
            raise explain(peer, "generate", error, EngineError) from None
        finally:
            self.in_flight[engine] -= len(seeds)
        return completions

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[FloatArray]]:
        return self._call("score", sequences)

    def load(self, plan: WeightPlan, buckets: Sequence[WeightBucket], version: int) -> None:
        """Engines stay paused until every one has committed; a failure raises and leaves them paused."""
        self._call("begin_update", plan)
        for bucket in buckets:
            self._call("load", bucket)
        self._call("commit", version)
        self._call("resume")

    @contextmanager
    def awake(self, what: Awake = "all") -> Iterator[None]:
        self._call("wake", what)
        yield
        self._call("sleep")

    def close(self) -> None:
        refs = [p.handle.call.remote("close") for p in self.peers]
        join(self.peers, refs, "close", 30.0, EngineError)
