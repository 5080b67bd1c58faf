"""The interfaces, each the sentence that its caller wants to write (built in trainer/, engine/, cluster/)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from redone.types import (
    Batch,
    CanaryReading,
    Completion,
    FloatArray,
    Policy,
    Prompt,
    RouteArray,
    Sampling,
    Score,
    Shard,
    UpdateReport,
    WeightBucket,
    WeightPlan,
)

if TYPE_CHECKING:
    from redone.config.schema import AlgorithmConfig

Awake = Literal["all", "weights"]
TrainerPart = Literal["all", "weights", "none"]  # of a rank's states: on the device


class Trainer(Protocol):
    """One process of an SPMD trainer: every rank calls every method, in the same order."""

    def logprobs(self, shard: Shard, policy: Policy, temperature: float) -> list[FloatArray] | None:
        """One [N] fp32 array per micro-batch, in row order; None on ranks without output (all but
        TP rank 0 of the last pipeline stage). Routes in the shard are repeated."""

    def logprobs_and_routes(
        self, shard: Shard, temperature: float
    ) -> tuple[list[FloatArray], list[RouteArray]] | None:
        """`logprobs` of the actor, and [T, L, K] expert choices per micro-batch, to repeat in updates.
        TrainerError for a dense model and with routing replay off."""

    def streams(self, shard: Shard) -> dict[str, FloatArray] | None:
        """The residual stream of a shard of one sequence: point (weights.layers) -> [tokens, hidden] fp32 of
        this rank's layers, and the margins of its routers. None on ranks that repeat others or hold no
        part of the sequence."""

    def update(self, shard: Shard, algorithm: AlgorithmConfig) -> UpdateReport:
        """One optimizer step over the whole shard. Raises TrainerError on a non-finite loss."""

    def set_lr_step(self, step: int) -> None:
        """Rollout step (from 0) whose learning rate the next updates use."""

    def weight_plan(self, bucket_bytes: int) -> WeightPlan: ...

    def publish(self, location: str, version: int) -> Iterator[WeightBucket]:
        """Collective generator, to be exhausted on every rank: gather, rename, write bucket after bucket into
        the channel; rank 0 gets each one as soon as it is written, the others get none."""

    def publish_again(self, location: str) -> None:
        """Rank 0 alone, weights.channel=collective: send what was published last to the group at `location`
        (redone.weights.collective). Raises SyncError when a member does not come."""

    def save(self, path: str) -> None: ...

    def load(self, path: str) -> None: ...

    def export(self, path: str) -> None:
        """Write a Hugging Face folder (rank 0 writes, all ranks take part)."""

    def hold(self, what: TrainerPart) -> None:
        """trainer.offload: exactly `what` is on the device afterwards; other methods bring what they need,
        and return it. Without it states stay, and "none" gives back what the allocator keeps."""

    def memory(self) -> dict[str, float]:
        """Bytes. states: of this rank, on its device. used: of the device, by all processes (CPU: of this
        process). peak: the highest `used` since the last call, as far as this rank's allocations made it."""

    def close(self) -> None: ...


class Engine(Protocol):
    """One rollout engine, all coroutines. A failed load poisons it until it is restarted or re-pushed."""

    async def start(self) -> dict[str, Any]:
        """Load the model; returns {"pid", "max_model_len", "vocab_size", "seconds"}."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        """len(seeds) completions of one prompt, one per seed, in that order."""

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[FloatArray]:
        """[len - 1] fp32 raw log-probabilities (temperature 1) of tokens 1.. of each sequence."""

    async def canary(self, sequences: Sequence[Sequence[int]], probe: Sequence[int]) -> CanaryReading:
        """score(sequences), and a few tokens written behind `probe` with the prefix cache in use: whatever
        the cache holds from an earlier canary must agree with the weights."""

    async def streams(self, sequence: Sequence[int], cached: bool) -> dict[str, FloatArray]:
        """The residual stream of `sequence`: point (weights.layers) -> [k, hidden] fp32 of its last k tokens
        (all of them unless `cached` lets the prefix cache stand in). EngineError when it cannot be read."""

    async def begin_update(self, plan: WeightPlan) -> None:
        """Pause generation (requests are kept), refuse a plan whose hash differs from the first one."""

    async def load(self, bucket: WeightBucket) -> None:
        """Verify digests and load. Raises SyncError that names the tensor."""

    async def commit(self, version: int) -> None:
        """Finish the update: post-process weights, drop KV and prefix caches, expose the version."""

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def sleep(self) -> None: ...

    async def wake(self, what: Awake) -> None: ...

    async def ping(self) -> None:
        """Return when the engine's loop is between two steps: one that hangs never answers. At once where the
        engine watches over itself. EngineError when it is closed or dead."""

    async def close(self) -> None: ...


class RewardFn(Protocol):
    def score(self, prompt: Prompt, completion: Completion) -> Score: ...


class Scorer(Protocol):
    """The driver's view of all rewards of a run (reward.pool.RewardPool)."""

    async def score_group(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        """In the order of `completions`. Never raises for a bad sample: its Score says status != "ok"."""


class TrainerGroup(Protocol):
    """The driver's view of all trainer ranks: plans, cuts, fans out, joins."""

    def logprobs(
        self, batch: Batch, policy: Policy = "actor", temperature: float | None = None
    ) -> list[list[FloatArray]]:
        """result[g][i]: [R] fp32 of trajectory i of group g. The reference policy routes for itself."""

    def score_old(self, batch: Batch) -> Batch:
        """The batch with `old_logprobs`; with the expert choices of that pass as well (R2) where
        trainer.moe.routing_replay asks for them and the rollout brought none."""

    def update(self, part: Batch, algorithm: AlgorithmConfig, step: int) -> UpdateReport:
        """One optimizer step of rollout step `step` (1-based), which decides the learning rate."""

    def push(self, engines: EngineFleet, version: int) -> dict[str, float]:
        """In place, digest-checked, all engines or none; then the canary. Returns the sync/* metrics."""

    def check_canary(self, engines: EngineFleet, version: int) -> dict[str, float]:
        """Fixed prompts, trainer against every engine: SyncError above weights.canary.tolerance, which names
        the first diverging layer. With trainer.offload the trainer sleeps first, the engines afterwards."""

    def awake(self, what: Awake = "all") -> AbstractContextManager[None]:
        """Within awake("all"), awake("weights") gives back what an update alone needs."""

    def memory(self) -> dict[str, float]:
        """trainer.offload: memory/<phase>_{before,peak,after}_gb of the phases since the last call, the
        fullest device's; phases are rollout, update, weight_update. Empty without it."""

    def save(self, path: str) -> None: ...

    def load(self, path: str) -> None: ...

    def export(self, path: str) -> None: ...


class EngineFleet(Protocol):
    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]: ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[FloatArray]]:
        """result[e][i]: engine e's log-probabilities of sequence i."""

    def canary(self, sequences: Sequence[Sequence[int]], probe: Sequence[int]) -> list[CanaryReading]:
        """One reading per engine."""

    def streams(self, engine: int, sequence: Sequence[int], cached: bool) -> dict[str, FloatArray]:
        """Engine.streams of one engine."""

    def load(self, plan: WeightPlan, buckets: Iterable[WeightBucket], version: int) -> None:
        """Load every bucket as it comes, then commit on all engines or none."""

    def awake(self, what: Awake = "all") -> AbstractContextManager[None]: ...


class Cluster(Protocol):
    """Made by cluster/ (Ray) or by a test."""

    def trainers(self) -> TrainerGroup: ...

    def engines(self) -> EngineFleet: ...

    def close(self) -> None: ...
