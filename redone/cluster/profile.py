"""record.profile: a trace of chosen trainer ranks from a step's first update to its weight update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redone.config.schema import Config
from redone.errors import TrainerError

# `nsys profile` options by Ray's names; the capture is started and ended by cudaProfilerStart and -Stop.
NSIGHT = {
    "t": "cuda,cudnn,cublas,nvtx,osrt",
    "o": "'trainer_%p'",
    "capture-range": "cudaProfilerApi",
    "capture-range-end": "repeat",
    "cuda-memory-usage": "true",
}


def runtime_env(cfg: Config, rank: int) -> dict[str, Any]:
    """What Ray's runtime_env needs so that rank `rank` runs under nsys; {} for every other tool and rank."""
    profile = cfg.record.profile
    return {"nsight": dict(NSIGHT)} if profile.tool == "nsys" and rank in profile.ranks else {}


class RankProfiler:
    """Of one trainer rank; start and stop in turn."""

    def __init__(self, cfg: Config) -> None:
        self.tool, self.cuda = cfg.record.profile.tool, cfg.cluster.device == "cuda"
        self._running: Any = None

    def start(self) -> None:
        """Raises TrainerError when the last one was not stopped, or for nsys without CUDA."""
        import torch

        if self._running is not None:
            raise TrainerError("the profiler is running already")
        if self.tool == "nsys":
            if not self.cuda:
                raise TrainerError("record.profile.tool=nsys needs cluster.device=cuda; use torch")
            torch.cuda.profiler.start()
            self._running = True
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.cuda else []
        self._running = torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)
        self._running.start()

    def stop(self, path: str) -> str:
        """Write the trace; returns its path ("" where nsys writes its own report into Ray's log folder)."""
        import torch

        running, self._running = self._running, None
        if running is None:
            raise TrainerError("the profiler is not running")
        if self.tool == "nsys":
            torch.cuda.profiler.stop()
            return ""
        running.stop()
        running.export_chrome_trace(path)
        return path


def trace_path(log_path: str, step: int) -> str:
    """Beside the rank's log file: logs/trainer-0.step3.trace.json.gz."""
    log = Path(log_path)
    return str(log.with_name(f"{log.stem}.step{step}.trace.json.gz"))
