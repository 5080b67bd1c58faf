"""The canary: fixed token sequences that trainer and engines must agree on after every weight update.

Digests prove that the right bytes arrived; what goes wrong behind them (packing, stale KV caches, a wrong
name table) shows only in the log-probabilities.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from redone.errors import SyncError
from redone.types import FloatArray, WeightBucket, WeightPlan

if TYPE_CHECKING:
    from redone.config.schema import CanaryConfig


PROBE_ROOM = 8  # tokens of context left behind the probe prompt


def canary_sequences(cfg: CanaryConfig, vocab_size: int, seed: int) -> list[list[int]]:
    """cfg.prompts sequences of cfg.length token ids, uniform over [0, vocab_size); a pure function."""
    rng = np.random.default_rng([seed, vocab_size, 0xCA9A])
    return [[int(t) for t in row] for row in rng.integers(0, vocab_size, (cfg.prompts, cfg.length))]


class Moved:
    """Counts what a push really moved, against the least that it could."""

    def __init__(self, plan: WeightPlan) -> None:
        self.plan = plan
        self.needed = self.written = self.gathered = 0  # bytes
        self.began = self.ended = time.monotonic()

    def watch(self, buckets: Iterable[WeightBucket]) -> Iterator[WeightBucket]:
        for bucket in buckets:
            first, last = self.plan.buckets[bucket.index]
            tensors = self.plan.tensors[first:last]
            left_out = set(bucket.unchanged)
            self.needed += sum(t.nbytes for i, t in enumerate(tensors) if i not in left_out)
            self.written += bucket.written
            self.gathered += bucket.gathered
            self.ended = time.monotonic()
            yield bucket

    def metrics(self) -> dict[str, float]:
        """sync/bytes_*: `needed` is the size of the tensors that changed; written to the channel that every
        engine rank maps; gathered by rank 0 from other ranks."""
        return {
            "sync/bytes_needed": float(self.needed),
            "sync/bytes_written": float(self.written),
            "sync/bytes_ratio": self.written / self.needed if self.needed else 1.0,
            "sync/bytes_gathered": float(self.gathered),
            "sync/publish_s": self.ended - self.began,
        }


def probe_prompt(sequences: Sequence[Sequence[int]], limit: int) -> list[int]:
    """The canary's sequences in one prompt, cut so that a few tokens more fit `limit`: long enough for full
    blocks of a prefix cache."""
    joined = [token for sequence in sequences for token in sequence]
    return joined[: max(1, limit - PROBE_ROOM)]


class CanaryError(SyncError):
    """`engine` and `prompt` are the indices where the largest difference stands."""

    def __init__(self, message: str, engine: int, prompt: int) -> None:
        super().__init__(message)
        self.engine, self.prompt = engine, prompt


def compare_canary(
    trainer: Sequence[Sequence[FloatArray]],
    engines: Sequence[Sequence[FloatArray]],
    tolerance: float,
    version: int,
) -> dict[str, float]:
    """Compare log-probabilities of the canary's tokens.

    Args:
        trainer: trainer[e][i]: log-probabilities of sequence i as engine e continued it, fp32, nats.
        engines: engines[e][i]: the same as engine e says it.
        tolerance: largest absolute difference allowed, nats.

    Returns:
        sync/canary_max_abs_diff and sync/canary_mean_abs_diff over all engines and tokens.

    Raises:
        CanaryError: the largest difference exceeds the tolerance (or is not a number); names the engine, the
            prompt, the token's position, both values and the tolerance.
    """
    worst, where = -1.0, (0, 0, 0)
    total, count = 0.0, 0
    for e, scores in enumerate(engines):
        for i, (ours, theirs) in enumerate(zip(trainer[e], scores, strict=True)):
            if ours.shape != theirs.shape:
                raise SyncError(
                    f"canary after version {version}: engine {e} scored {theirs.shape[0]} tokens of prompt "
                    f"{i}, the trainer {ours.shape[0]}"
                )
            diff = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
            # A NaN compares as smaller than everything; it is the worst possible disagreement.
            diff = np.where(np.isnan(diff), np.inf, diff)
            total, count = total + float(diff.sum()), count + diff.size
            j = int(diff.argmax())
            if diff[j] > worst:
                worst, where = float(diff[j]), (e, i, j)
    if count == 0:
        raise SyncError(f"canary after version {version}: no engine scored anything")
    if not worst <= tolerance:
        e, i, j = where
        shown = "not a number" if math.isinf(worst) else f"{worst:.3e}"
        raise CanaryError(
            f"canary after version {version}: engine {e} disagrees with the trainer on prompt {i}, token "
            f"{j + 1}: trainer {trainer[e][i][j]:.6f}, engine {engines[e][i][j]:.6f}, difference {shown} > "
            f"weights.canary.tolerance={tolerance:g} (mean {total / count:.3e})",
            engine=e,
            prompt=i,
        )
    return {"sync/canary_max_abs_diff": worst, "sync/canary_mean_abs_diff": total / count}
