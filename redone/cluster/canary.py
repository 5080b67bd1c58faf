"""The canary on the driver: trainer against every engine, and where they begin to differ when they do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from redone.api import EngineFleet
from redone.config.schema import Config
from redone.errors import RedoneError, SyncError
from redone.types import Batch, FloatArray, TrainGroup, Trajectory
from redone.weights.layers import Divergence, expert_tie, first_divergence, relative_differences
from redone.weights.sync import CanaryError, canary_sequences, compare_canary, probe_prompt

log = logging.getLogger(__name__)

MAX_TIES = 3  # sets of sequences that may fail so in one check
DRAWS = 7919  # seeds of other sets: far from those of other runs


class Reference(Protocol):
    """What the canary asks of the trainer ranks together."""

    def logprobs(self, batch: Batch, *, temperature: float) -> list[list[FloatArray]]: ...

    def streams(self, batch: Batch) -> Mapping[str, FloatArray]: ...


@dataclass(frozen=True)
class Canary:
    """sequences: scored from scratch; probe: a prompt that engines answer from their prefix cache."""

    cfg: Config
    vocab_size: int
    sequences: Sequence[Sequence[int]]
    probe: Sequence[int]

    @staticmethod
    def of(cfg: Config, vocab_size: int, draw: int = 0) -> Canary:
        """draw: which of the possible sets of sequences."""
        sequences = canary_sequences(cfg.weights.canary, vocab_size, cfg.run.seed + draw)
        limit = cfg.model.max_model_len or cfg.data.max_prompt_length + cfg.data.max_response_length
        return Canary(cfg, vocab_size, sequences, probe_prompt(sequences, limit))

    def check(self, trainer: Reference, engines: EngineFleet, version: int) -> dict[str, float]:
        """The sync/canary_* metrics. SyncError above the tolerance, with the first diverging layer's name.

        A difference that begins with a tie between experts says nothing of the weights: other sequences are
        asked in place of these.
        """
        canary, ties = self, 0
        while True:
            try:
                return canary._compare_all(trainer, engines, version) | {"sync/canary_ties": float(ties)}
            except CanaryError as failure:
                where, tie = canary._locate(trainer, engines, failure)
                ties += 1
                if tie is None or ties > MAX_TIES:
                    raise SyncError(f"{failure}; {where}" + (f"; {tie}" if tie else "")) from None
                log.warning("%s; %s; %s. Other sequences are compared", failure, where, tie)
                canary = Canary.of(self.cfg, self.vocab_size, DRAWS * ties)

    def _compare_all(self, trainer: Reference, engines: EngineFleet, version: int) -> dict[str, float]:
        with self._awake(engines):
            readings = engines.canary(self.sequences, self.probe)
        theirs = [[*r.scores, r.probe_logprobs] for r in readings]
        probes = [[*self.probe, *r.probe_ids.tolist()] for r in readings]
        rows = [r[0] for r in trainer.logprobs(as_batch([*self.sequences, *probes]), temperature=1.0)]
        count, written = len(self.sequences), len(self.probe) - 1
        ours = [[*rows[:count], rows[count + e][written:]] for e in range(len(readings))]
        return compare_canary(ours, theirs, self.cfg.weights.canary.tolerance, version)

    def _locate(
        self, trainer: Reference, engines: EngineFleet, failure: CanaryError
    ) -> tuple[str, str | None]:
        """What differs first on the prompt that failed, in words; and expert_tie of it."""
        cached = failure.prompt == len(self.sequences)
        sequence = self.probe if cached else self.sequences[failure.prompt]
        try:
            ours = trainer.streams(as_batch([sequence]))
            with self._awake(engines):
                theirs = engines.streams(failure.engine, sequence, cached)
                again = engines.streams(failure.engine, sequence, False) if cached else theirs
        except RedoneError as error:
            return f"the layers could not be compared: {error}", None
        found = self._compare(ours, theirs)
        if not cached or found.point is None:
            return found.text(), self._tie(found, ours, theirs)
        fresh = self._compare(ours, again)
        if fresh.point is None:
            return (
                f"{found.text()}; computed from scratch the layers agree: the engine's prefix cache "
                "holds keys and values of older weights"
            ), None
        order = list(again)
        if found.point != fresh.point and order.index(found.point) < order.index(fresh.point):
            return found.text(), None  # something is wrong before the tie that there may be from scratch
        return fresh.text(), self._tie(fresh, ours, again)

    def _tie(
        self, found: Divergence, ours: Mapping[str, FloatArray], theirs: Mapping[str, FloatArray]
    ) -> str | None:
        return found.point and expert_tie(found.point, ours, theirs, self.cfg.model.dtype)

    def _awake(self, engines: EngineFleet) -> AbstractContextManager[None]:
        """trainer.offload: they sleep whenever the trainer works. Otherwise scoring wakes what it needs."""
        return engines.awake() if self.cfg.trainer.offload else nullcontext()

    def _compare(self, ours: Mapping[str, FloatArray], theirs: Mapping[str, FloatArray]) -> Divergence:
        differences = relative_differences(ours, theirs)
        for point, difference in differences.items():
            log.info("canary: %-32s relative difference %.2e", point, difference)
        return first_divergence(differences, self.cfg.model.dtype)


def as_batch(sequences: Sequence[Sequence[int]]) -> Batch:
    """Score tokens 1.. of each sequence: its first token is the prompt, the rest is the response."""
    return Batch.of(
        [
            TrainGroup(
                prompt_id=f"canary-{i}",
                prompt_ids=np.asarray(sequence[:1], np.int32),
                trajectories=(Trajectory.unscored(np.asarray(sequence[1:], np.int32)),),
            )
            for i, sequence in enumerate(sequences)
        ]
    )
