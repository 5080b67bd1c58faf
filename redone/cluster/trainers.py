"""The driver's view of all trainer ranks: plans the step, cuts it by rank, fans out, joins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray.exceptions import RayError

from redone.api import Awake, EngineFleet, TrainerPart
from redone.cluster.canary import Canary
from redone.cluster.profile import trace_path
from redone.cluster.remote import Peer, blame, join
from redone.cluster.turns import Turns
from redone.config.schema import AlgorithmConfig, Config
from redone.data.balance import Cost
from redone.data.pack import build_shards, plan_step, scatter_routes, scatter_rows
from redone.errors import TrainerError
from redone.types import Batch, FloatArray, Policy, StepPlan, UpdateReport, WeightBucket, WeightPlan
from redone.weights.sync import Moved


class RayTrainerGroup:
    """redone.api.TrainerGroup over Ray actors. `infos[r]` is what rank r said of itself at start."""

    def __init__(
        self, cfg: Config, peers: Sequence[Peer], infos: Sequence[dict[str, Any]], location: str
    ) -> None:
        self.cfg, self.peers, self.infos, self.location = cfg, peers, infos, location
        self.dp = int(infos[0]["dp_size"])
        self.plan: WeightPlan = self._call("weight_plan", cfg.weights.bucket_bytes)[0]
        self.canary = Canary.of(cfg, int(infos[0]["vocab_size"]))
        self.pushes = 0
        self.profiled_step: int | None = None
        self.turns: Turns | None = None  # trainer.offload
        self._awake = False

    def _call(self, method: str, *args: Any) -> list[Any]:
        refs = [p.handle.call.remote(method, *args) for p in self.peers]
        return join(self.peers, refs, method, self.cfg.trainer.timeout_s, TrainerError)

    def _call_sharded(self, method: str, batch: Batch, *args: Any) -> tuple[StepPlan, list[Any]]:
        trainer = self.cfg.trainer
        row, pair = self.infos[0]["cost"]
        cost = Cost(row=row, pair=pair)
        plan = plan_step(batch, self.dp, trainer.max_token_len_per_rank, trainer.prefix_sharing, cost)
        multiple = int(self.infos[0]["row_multiple"])
        shards = [ray.put(s) for s in build_shards(batch, plan, pad_multiple=multiple)]
        refs = [
            p.handle.call.remote(method, shards[int(info["dp_rank"])], *args)
            for p, info in zip(self.peers, self.infos, strict=True)
        ]
        return plan, join(self.peers, refs, method, trainer.timeout_s, TrainerError)

    def logprobs(
        self, batch: Batch, policy: Policy = "actor", temperature: float | None = None
    ) -> list[list[FloatArray]]:
        """result[g][i]: [R] fp32. temperature None: the rollout's."""
        if temperature is None:
            temperature = self.cfg.rollout.temperature
        if policy == "reference":
            batch = batch.without_routes()
        plan, results = self._call_sharded("logprobs", batch, policy, temperature)
        return scatter_rows(batch, plan, self._by_replica(results))

    def score_old(self, batch: Batch) -> Batch:
        """See redone.api."""
        if not self.infos[0]["records_routes"] or batch.has_routes:
            return batch.with_logprobs("old_logprobs", self.logprobs(batch))
        plan, results = self._call_sharded("logprobs_and_routes", batch, self.cfg.rollout.temperature)
        found = self._by_replica(results)
        batch = batch.with_logprobs("old_logprobs", scatter_rows(batch, plan, [rows for rows, _ in found]))
        return scatter_routes(batch, plan, [routes for _, routes in found])

    def _by_replica(self, results: Sequence[Any]) -> list[Any]:
        """Of every data-parallel replica what the rank with output returned."""
        found: list[Any] = [None] * self.dp
        for info, result in zip(self.infos, results, strict=True):
            if result is not None:
                found[int(info["dp_rank"])] = result
        return found

    def update(self, part: Batch, algorithm: AlgorithmConfig, step: int) -> UpdateReport:
        if step in self.cfg.record.profile.steps and self.profiled_step is None:
            self._profile(step)
        self._call("set_lr_step", step - 1)
        _, reports = self._call_sharded("update", part, algorithm)
        report: UpdateReport = reports[0]
        if report.skipped:
            raise TrainerError(
                f"the optimizer refused a step: non-finite gradients (grad norm {report.grad_norm})"
            )
        return report

    def push(self, engines: EngineFleet, version: int) -> dict[str, float]:
        moved = Moved(self.plan)
        engines.load(self.plan, moved.watch(self.publish(version)), version)
        metrics = {**moved.metrics(), "sync/version": float(version)}
        self.pushes += 1
        every = self.cfg.weights.canary.every
        if every and self.pushes % every == 0:
            metrics |= self.check_canary(engines, version)
        return metrics

    def publish(self, version: int) -> Iterator[WeightBucket]:
        """Buckets as rank 0 writes them, while all ranks gather."""
        first, *others = self.peers
        timeout = self.cfg.trainer.timeout_s
        refs = [p.handle.exhaust.remote("publish", self.location, version) for p in others]
        try:
            for ref in first.handle.stream.options(num_returns="streaming").remote(
                "publish", self.location, version
            ):
                yield ray.get(ref, timeout=timeout)
        except RayError as error:
            raise blame([first, *others], error, refs, "publish", TrainerError) from None
        join(others, refs, "publish", timeout, TrainerError)

    def publish_again(self, location: str) -> Callable[[], object]:
        """Rank 0 begins to send the last version to the group at `location`; the result waits for the end."""
        ref = self.peers[0].handle.call.remote("publish_again", location)
        return lambda: join(self.peers[:1], [ref], "publish_again", self.cfg.trainer.timeout_s, TrainerError)

    def check_canary(self, engines: EngineFleet, version: int) -> dict[str, float]:
        """Fixed prompts, trainer against every engine. Raises SyncError above weights.canary.tolerance."""
        self.rest()  # the engines need their caches
        return self.canary.check(self, engines, version)

    def streams(self, batch: Batch) -> dict[str, FloatArray]:
        """The residual stream of a batch of one sequence: point -> [tokens, hidden] fp32."""
        _, results = self._call_sharded("streams", batch)
        return {point: stream for part in results if part is not None for point, stream in part.items()}

    @contextmanager
    def awake(self, what: Awake = "all") -> Iterator[None]:
        """See redone.api."""
        inner = self._awake
        with (
            self.turns.phase("update" if what == "all" else "weight_update") if self.turns else nullcontext()
        ):
            self._become(what)
            self._awake = True
            yield  # no finally: after an error the ranks may hang in a collective, and sleep waits for them
            if inner:
                return
            if self.profiled_step is not None:
                self._profile(None)
            self._awake = False
            self._become("none")

    def _become(self, part: TrainerPart) -> None:
        if self.turns is not None:
            self.turns.trainer_becomes(part)
        self._call("hold", part)

    def rest(self) -> None:
        """trainer.offload: leave the device, whatever the phase; what needs states brings them."""
        if self.turns is not None:
            self._become("none")

    def readings(self) -> list[dict[str, float]]:
        """Trainer.memory of every rank."""
        return self._call("memory")

    def memory(self) -> dict[str, float]:
        """See redone.api."""
        return self.turns.take_metrics() if self.turns is not None else {}

    def _profile(self, step: int | None) -> None:
        """Start a trace of step `step`, or end the one that runs, on record.profile.ranks."""
        profile = self.cfg.record.profile
        if profile.tool == "off":
            return
        peers = [self.peers[rank] for rank in profile.ranks]
        of = self.profiled_step
        paths = [None if of is None else trace_path(peer.log_path, of) for peer in peers]
        refs = [p.handle.profile.remote(path) for p, path in zip(peers, paths, strict=True)]
        join(peers, refs, "profile", self.cfg.trainer.timeout_s, TrainerError)
        self.profiled_step = step

    def save(self, path: str) -> None:
        self._call("save", path)

    def load(self, path: str) -> None:
        self._call("load", path)

    def export(self, path: str) -> None:
        self._call("export", path)

    def close(self) -> None:
        refs = [p.handle.call.remote("close") for p in self.peers]
        ray.wait(refs, num_returns=len(refs), timeout=10)
