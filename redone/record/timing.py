"""Seconds per named phase, summed until they are drained into a step's metrics."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Timings:
    """Phases may repeat (their seconds add up) and nest (each counts its own wall time)."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Adds the wall time of the block to `name`, also when the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def seconds(self) -> Mapping[str, float]:
        """name -> seconds since the last drain."""
        return dict(self._seconds)

    def drain(self) -> dict[str, float]:
        """timing_s/<name> of every phase, timing_s/step since the last drain; starts anew."""
        now = time.perf_counter()
        drained = {f"timing_s/{name}": value for name, value in self._seconds.items()}
        drained["timing_s/step"] = now - self._since
        self._seconds.clear()
        self._since = now
        return drained
