"""The state of a weight update: which plan, what has arrived, and whether the engine may still generate."""

from __future__ import annotations

from redone.engine.folder import ModelFolder
from redone.errors import EngineError, SyncError
from redone.types import WeightBucket, WeightPlan
from redone.weights.plan import bucket_tensors
from redone.weights.units import to_load


class UpdateState:
    """begin, arrived (per bucket), committed; a failure in between poisons until a complete new update."""

    def __init__(self, engine: str, folder: ModelFolder) -> None:
        self.engine, self.folder = engine, folder
        self.version = 0
        self._held: int | None = None  # version that is loaded completely, of the last commit
        self._plan: WeightPlan | None = None
        self._arrived: set[int] | None = None  # None: no update in progress
        self._poison: str | None = None

    @property
    def plan(self) -> WeightPlan:
        """The plan of the update in progress. Raises SyncError outside of one."""
        if self._plan is None or self._arrived is None:
            raise SyncError(f"{self.engine}: no weight update in progress; call begin_update first")
        return self._plan

    def begin(self, plan: WeightPlan) -> None:
        """The first plan is checked against the model folder, later ones must equal it. Raises SyncError."""
        if self._plan is None:
            self.folder.check_plan(plan)
        elif plan.hash != self._plan.hash:
            raise SyncError(
                f"{self.engine}: weight plan {plan.hash} differs from {self._plan.hash}, that of the first "
                "update; trainer and engine do not hold the same model"
            )
        self._plan = plan
        self._arrived = set()

    def check_bucket(self, bucket: WeightBucket) -> None:
        """Raises SyncError for a bucket that the plan does not have."""
        bucket_tensors(self.plan, bucket.index)

    def assignment(self, bucket: WeightBucket) -> tuple[int, int, str, list[int], list[str]]:
        """Arguments of a worker: version, index, location, digests, names of the tensors to load."""
        tensors = to_load(bucket, bucket_tensors(self.plan, bucket.index), self._held)
        names = [t.name for t in tensors]
        return bucket.version, bucket.index, bucket.location, list(bucket.digests), names

    def arrived(self, bucket: WeightBucket) -> None:
        assert self._arrived is not None
        self._arrived.add(bucket.index)

    def check_complete(self) -> None:
        """Raises SyncError outside of an update, and naming the first tensor of a bucket that never came."""
        plan = self.plan
        assert self._arrived is not None
        missing = sorted(set(range(len(plan.buckets))) - self._arrived)
        if missing:
            first = bucket_tensors(plan, missing[0])[0].name
            raise SyncError(
                f"{self.engine}: commit without bucket(s) {missing} of {len(plan.buckets)}; the first "
                f"tensor that never came is {first!r}"
            )

    def committed(self, version: int) -> None:
        self.version, self._arrived, self._poison = version, None, None
        self._held = version

    def poison(self, reason: str) -> None:
        """The weights are a mixture now; the engine must not generate. What followed is not the reason."""
        if self._poison is None or self._arrived is not None:
            self._poison = reason
        self._arrived = self._held = None

    def check_usable(self) -> None:
        """Raises EngineError on a poisoned engine."""
        if self._poison is not None:
            raise EngineError(
                f"{self.engine} is poisoned by a failed weight update ({self._poison}); push all weights "
                "again or restart it"
            )

    def check_idle(self) -> None:
        """Raises EngineError between begin and the end of an update."""
        if self._arrived is not None:
            raise EngineError(
                f"{self.engine}: {len(self._arrived)} of {len(self.plan.buckets)} buckets of a weight update "
                "have arrived; finish it with commit before generation continues"
            )
