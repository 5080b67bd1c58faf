"""The recorder: what the pipeline tells about a run goes to the display, the sinks and the samples file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from redone.config.schema import RecordConfig
from redone.record.console import Display
from redone.record.samples import SampleWriter
from redone.record.sinks import Sink, build_sinks
from redone.record.timing import Timings
from redone.types import Group

log = logging.getLogger(__name__)


class Recorder:
    """The pipeline's observer (pipeline.train.Observer). A context manager: closing flushes every sink.

    `devices`: trainer ranks; perf/throughput is tokens per second and device, as verl's.
    """

    def __init__(
        self,
        folder: Path,
        cfg: RecordConfig,
        *,
        total_steps: int,
        first_step: int = 1,
        devices: int = 1,
        name: str = "run",
        config: Mapping[str, Any] | None = None,
        listener: Callable[[int, Mapping[str, float]], str | None] | None = None,
        display: Display | None = None,
    ) -> None:
        """`display`: in the place of one of its own, for a run inside a pipeline."""
        self._sinks: list[Sink] = build_sinks(
            cfg.loggers, folder, project=cfg.project, name=name, config=config or {}
        )
        self._listener = listener  # reads every step's complete metrics; what it returns becomes a note
        self._samples = SampleWriter(folder / "samples.jsonl", cfg.samples_per_step)
        self._timings = Timings()
        self._devices = devices
        self._response_tokens = 0  # of the current step
        self._total_tokens = 0
        self.current = "start"  # the phase that runs, or the last one
        own = Display(total_steps, first_step) if "console" in cfg.loggers else None
        self._display = display or own

    def __enter__(self) -> Recorder:
        if self._display:
            self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close every sink, also when an earlier one fails."""
        if self._display:
            self._display.close()
        self._samples.close()
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            try:
                sink.close()
            except (OSError, RuntimeError) as error:
                log.error("closing %s: %s", type(sink).__name__, error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what runs inside it as timing_s/<name> of the current step, and shows it."""
        log.info("phase %s", name)
        self.current = name
        if self._display:
            self._display.enter(name)
        try:
            with self._timings.timing(name):
                yield
        finally:
            if self._display:
                self._display.leave()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the step's metrics with the seconds of its phases and the throughput."""
        complete = {**metrics, **self._timings.drain()}
        seconds = complete["timing_s/step"]
        complete["perf/time_per_step"] = seconds
        tokens = float(self._total_tokens) or metrics.get("perf/total_num_tokens", 0.0)  # SFT counts itself
        if tokens and seconds > 0:
            complete["perf/total_num_tokens"] = tokens
            complete["perf/throughput"] = tokens / seconds / self._devices
        if self._response_tokens and complete.get("timing_s/gen", 0.0) > 0:
            complete["perf/gen_throughput"] = self._response_tokens / complete["timing_s/gen"]
        self._response_tokens = self._total_tokens = 0
        for sink in self._sinks:
            sink.write(step, complete)
        if self._display:
            self._display.step(step, complete)
        log.info("step %d done in %.1f s", step, seconds)
        if self._listener is not None and (told := self._listener(step, complete)):
            self.note(told)

    def samples(self, step: int, groups: Sequence[Group]) -> None:
        """A few rollouts go to samples.jsonl; the tokens of all of them are counted for perf/*.

        As in verl, every sample counts its prompt: prefix sharing shows as throughput.
        """
        self._samples.write(step, groups)
        for group in groups:
            responses = sum(len(rollout.completion.token_ids) for rollout in group.rollouts)
            self._response_tokens += responses
            self._total_tokens += responses + len(group.prompt.token_ids) * len(group.rollouts)

    def note(self, message: str) -> None:
        """Something the user should read now, and find in the log later."""
        log.info("%s", message)
        if self._display:
            self._display.note(message)
