"""Trainer and engines on the same devices, in turn: what may be there together, and what each phase took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from redone.api import TrainerPart
from redone.errors import RedoneError

GB = 1e9
# What engines have on the device -> what the trainer may have there.
TOGETHER: dict[TrainerPart, tuple[TrainerPart, ...]] = {
    "none": ("none", "weights", "all"),
    "weights": ("none", "weights"),
    "all": ("none",),
}


class Turns:
    """trainer.offload=true. A driver that wakes one side before the other sleeps is an error here, on the CPU
    as well, and not out of memory on a GPU.

    Args:
        read: Trainer.memory of every rank.
    """

    def __init__(self, read: Callable[[], Sequence[Mapping[str, float]]]) -> None:
        self._read = read
        self.trainer: TrainerPart = "none"
        self.engines: TrainerPart = "none"
        self._metrics: dict[str, float] = {}
        self._open: list[str] = []

    def take_metrics(self) -> dict[str, float]:
        """memory/<phase>_{before,peak,after}_gb since the last call."""
        found, self._metrics = self._metrics, {}
        return found

    def trainer_becomes(self, part: TrainerPart) -> None:
        """Before it does."""
        self._check(part, self.engines)
        self.trainer = part

    def engines_become(self, part: TrainerPart) -> None:
        self._check(self.trainer, part)
        self.engines = part

    def _check(self, trainer: TrainerPart, engines: TrainerPart) -> None:
        if trainer not in TOGETHER[engines]:
            raise RedoneError(
                f"trainer.offload=true: the engines hold {_said[engines]} while the trainer holds "
                f"{_said[trainer]}; one side has to sleep first. This is a mistake in redone's order of "
                "phases: please report it; trainer.offload=false goes on without"
            )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it one side wakes, works, and sleeps. Nothing is read after an error: ranks may hang."""
        self._most(f"memory/{name}_before_gb", self.look())
        self._open.append(name)
        yield
        self._most(f"memory/{name}_after_gb", self.look())
        self._open.pop()

    def look(self) -> float:
        """GB in use on the fullest device; the highest since the last look is the innermost open phase's."""
        readings = self._read()
        used = max((r["used"] for r in readings), default=0.0) / GB
        peak = max((r["peak"] for r in readings), default=0.0) / GB
        if self._open:
            self._most(f"memory/{self._open[-1]}_peak_gb", max(used, peak))
        return used

    def _most(self, name: str, value: float) -> None:
        self._metrics[name] = max(value, self._metrics.get(name, 0.0))


_said = {"none": "nothing", "weights": "weights", "all": "everything"}
