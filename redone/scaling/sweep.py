"""What is run: the points of a sweep as data, and what became of them in its folder.

sweep.json          the experiment; a folder takes one only
points/ID/          the run folder of every point
points/ID.log       what its run printed; points/ID.failed: that it failed; on SLURM: ID/logs
scaling.csv scaling.json report.html     written again after every point
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from redone.config.schema import Config
from redone.errors import ConfigError, RunFolderError

Mode = Literal["strong", "weak"]
State = Literal["done", "queued", "failed", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One experiment. The configuration's batch is that of the smallest node count, its engines are those of
    its own cluster.nodes."""

    config: str
    overrides: tuple[str, ...]
    nodes: tuple[int, ...]  # ascending
    modes: tuple[Mode, ...]
    seeds: tuple[int, ...]
    repeats: int  # of every seed
    steps: int  # of every run
    warmup: int  # first steps that are not counted
    simulated: bool  # nodes are groups of trainer ranks on this machine
    scale_engines: bool  # engines grow with the nodes
    gpu: str | None = None  # planner's hardware; None on simulated nodes: this machine's roofline
    price: float | None = None  # per GPU and hour

    def check(self) -> None:
        """Raises ConfigError with what to change."""
        if not self.nodes or min(self.nodes) < 1 or len(set(self.nodes)) < len(self.nodes):
            raise ConfigError(f"--nodes {list(self.nodes)}: different numbers of 1 or more, e.g. 1,2,4")
        if self.steps <= self.warmup:
            raise ConfigError(f"--steps {self.steps} leaves nothing after --warmup {self.warmup}; raise it")
        if self.repeats < 1 or not self.seeds or not self.modes:
            raise ConfigError("--repeats, --seeds and --scaling: at least one of each")

    @property
    def base(self) -> int:
        return min(self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run. At the smallest node count strong and weak scaling are the same work and share it."""

    id: str
    modes: tuple[Mode, ...]
    nodes: int
    seed: int
    repeat: int
    overrides: tuple[str, ...]


def points(sweep: Sweep, cfg: Config, folder: Path) -> list[Point]:
    """Every run of the sweep; repeats outermost, so that a machine's drift meets all node counts alike."""
    found = []
    for repeat in range(sweep.repeats):
        for seed in sweep.seeds:
            for modes, nodes in _cells(sweep):
                name = "base" if len(modes) > 1 or nodes == sweep.base else modes[0]
                point = Point(
                    id=f"{name}-n{nodes}-s{seed}-r{repeat}",
                    modes=modes,
                    nodes=nodes,
                    seed=seed,
                    repeat=repeat,
                    overrides=(),
                )
                found.append(replace(point, overrides=tuple(_overrides(point, sweep, cfg, folder))))
    return found


def _cells(sweep: Sweep) -> Iterator[tuple[tuple[Mode, ...], int]]:
    for nodes in sorted(sweep.nodes):
        if nodes == sweep.base:
            yield sweep.modes, nodes
        else:
            yield from (((mode,), nodes) for mode in sweep.modes)


def _overrides(point: Point, sweep: Sweep, cfg: Config, folder: Path) -> Iterator[str]:
    """Cluster, batch, seed; and everything off that is no part of a step or makes its work vary."""
    factor = point.nodes / sweep.base
    yield from sweep.overrides
    if sweep.simulated:
        yield "cluster.nodes=1"
        yield f"cluster.gpus_per_node={cfg.cluster.gpus_per_node * point.nodes}"
    else:
        yield f"cluster.nodes={point.nodes}"
    if sweep.scale_engines:
        nodes_of_config = 1 if sweep.simulated else cfg.cluster.nodes
        yield f"rollout.replicas={max(1, round(cfg.rollout.replicas * point.nodes / nodes_of_config))}"
    if "weak" in point.modes and factor != 1:
        for key in ("train_batch_size", "ppo_mini_batch_size"):
            size = getattr(cfg.algorithm, key) * factor
            if size != int(size):
                raise ConfigError(
                    f"weak scaling: algorithm.{key} x {point.nodes}/{sweep.base} is not whole; choose "
                    f"--nodes that are multiples of {sweep.base}"
                )
            yield f"algorithm.{key}={int(size)}"
    yield f"algorithm.total_steps={sweep.steps}"
    yield from ("algorithm.filter_groups.enable=false", "data.val=[]", "data.test=[]")
    yield from ("evaluate.every=0", "evaluate.before_train=false", "evaluate.baselines=[]")
    yield from ("evaluate.keep_best=false", "evaluate.early_stop.enable=false")
    yield from ("checkpoint.every=0", "checkpoint.at_end=false", "checkpoint.export_hf=false")
    yield from (f"run.seed={point.seed}", f"run.dir={folder / 'points'}", f"run.name={point.id}")


def open_folder(folder: Path, sweep: Sweep) -> None:
    """Create the folder, or take up the same sweep again. Raises RunFolderError when it holds another."""
    if (folder / "sweep.json").exists():
        if (there := read_sweep(folder)) != sweep:
            before, now = asdict(there), asdict(sweep)
            changed = ", ".join(f"{k}: {before[k]} -> {now[k]}" for k in now if before[k] != now[k])
            raise RunFolderError(f"{folder} holds another sweep ({changed}); remedy: another --out")
        return
    (folder / "points").mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(asdict(sweep), indent=1) + "\n", encoding="utf-8")


def read_sweep(folder: Path) -> Sweep:
    """Raises RunFolderError when the folder holds none."""
    try:
        found = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        return Sweep(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(
            f"{folder} is no scaling folder: {error}; give the --out of redone scale"
        ) from error


def read_rows(folder: Path, point: Point) -> list[dict[str, float]]:
    """Metrics of the point's steps 1, 2, ... so far; a half-written last line is left out."""
    try:
        lines = (folder / "points" / point.id / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return [row for row in rows if row.get("step", 0) >= 1]


def state(folder: Path, sweep: Sweep, point: Point) -> State:
    if len(read_rows(folder, point)) >= sweep.steps:
        return "done"
    if failure(folder, point) is not None:
        return "failed"
    return "queued" if point.id in read_jobs(folder) else "missing"


def failure(folder: Path, point: Point) -> str | None:
    """How the point's run, or the last attempt of its job, failed; None when it did not."""
    mark = folder / "points" / f"{point.id}.failed"
    if mark.exists():
        return mark.read_text(encoding="utf-8").strip()
    attempts = folder / "points" / point.id / "slurm" / "attempts.jsonl"
    if not attempts.exists():
        return None
    last = json.loads(attempts.read_text(encoding="utf-8").splitlines()[-1])
    return str(last["reason"]) if last["outcome"] in ("failed", "cancelled") else None


def clear(folder: Path, points: Sequence[Point]) -> None:
    """Remove what a cut-off attempt of these points left."""
    for point in points:
        shutil.rmtree(folder / "points" / point.id, ignore_errors=True)
        (folder / "points" / f"{point.id}.failed").unlink(missing_ok=True)


def read_jobs(folder: Path) -> dict[str, str]:
    """Point -> job id, of a sweep that was submitted."""
    path = folder / "jobs.json"
    if not path.exists():
        return {}
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_jobs(folder: Path, jobs: dict[str, str]) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs, indent=1) + "\n", encoding="utf-8")
