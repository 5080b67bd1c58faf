"""`redone submit CONFIG --nodes N`: check, plan, render the job script into a run folder, queue it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from redone import __version__
from redone.config.check import check_config, read_model_config
from redone.config.load import load_config
from redone.config.schema import Config
from redone.errors import ConfigError, RunFolderError
from redone.pipeline.folder import JOB_FILE, RunFolder, write_json
from redone_launcher.site import Site, read_site
from redone_launcher.slurm import Partition, SlurmError, job_state, partitions, slurm

TEMPLATES = Path(__file__).resolve().parents[2] / "slurm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Arguments of `redone submit`."""

    config: Path | None
    overrides: tuple[str, ...]
    nodes: int | None
    site: Path
    resume: Path | None = None
    dry_run: bool = False
    force: bool = False
    gpu: str | None = None
    dependency: str | None = None  # sbatch's, e.g. afterok:123


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """`job` is None after a dry run."""

    folder: Path
    script: Path
    job: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run folder with its job script, not queued yet."""

    cfg: Config
    site: Site
    folder: RunFolder
    script: Path
    notes: tuple[str, ...]


def submit(request: Request) -> Submitted:
    """Raises RedoneError: one message, what to change. Nothing is written before every check passed."""
    ready = prepare(request)
    job = None
    if not request.dry_run:
        job = _sbatch(ready.script, request.dependency)
        _remember(ready, job)
    return Submitted(folder=ready.folder.path, script=ready.script, job=job, notes=ready.notes)


def submit_array(
    requests: Sequence[Request], script: Path, *, name: str, serial: bool, dependency: str | None = None
) -> str:
    """Queue the runs as one job array, written to `script`; run i is task i. `serial`: one task at a time.

    The requests may differ in what a job asks of SLURM by the run's name alone. Returns the array's job id.
    """
    ready = [prepare(request) for request in requests]
    own = ("--job-name=", "--output=")
    lines = [
        [line for line in sbatch_options(p.cfg, p.site, p.folder.path.resolve()) if not line.startswith(own)]
        for p in ready
    ]
    if any(other != lines[0] for other in lines):
        raise ConfigError(f"{name}: runs of one job array must ask for the same nodes, time and CPUs")
    runs = [str(p.folder.path.resolve()) for p in ready]
    last = f"0-{len(runs) - 1}" + ("%1" if serial else "")
    output = f"--output={script.resolve().with_suffix('')}-%a.out"  # SLURM's own words
    options = [f"--job-name={name}", f"--array={last}", output, *lines[0]]
    script.write_text(_templates(TEMPLATES).get_template("array.sbatch").render(options=options, runs=runs))
    job = _sbatch(script, dependency)
    for index, one in enumerate(ready):
        _remember(one, f"{job}_{index}")
    return job


def prepare(request: Request) -> Prepared:
    """Check, plan, and write the run folder and its script. Raises RedoneError before anything is written."""
    site = read_site(request.site)
    cfg, notes = _load(request, site)
    notes += check_config(cfg, read_model_config(cfg.model.path))
    plan_text, warned = _gate(cfg, request, site)
    notes += warned
    if not request.dry_run:
        _fits(cfg, site, partitions())
    if request.resume is not None:
        folder = RunFolder.open(request.resume)
        _not_queued(folder.path)
        (folder.path / "slurm" / "excluded").unlink(missing_ok=True)
    else:
        folder = RunFolder.create(cfg)
    place = folder.path.resolve() / "slurm"
    place.mkdir(exist_ok=True)
    shutil.copyfile(request.site, place / "site.env")
    if plan_text:
        (place / "plan.txt").write_text(plan_text + "\n")
    script = place / "job.sbatch"
    script.write_text(render(cfg, site, folder.path.resolve(), Path.cwd()))
    script.chmod(0o755)
    return Prepared(cfg=cfg, site=site, folder=folder, script=script, notes=tuple(notes))


def _remember(ready: Prepared, job: str) -> None:
    """For `redone status`, `logs` and `cancel`."""
    about = {"job": job, "nodes": ready.cfg.cluster.nodes, "script": str(ready.script)}
    write_json(ready.folder.path / JOB_FILE, about)


def _load(request: Request, site: Site) -> tuple[Config, list[str]]:
    """The configuration with --nodes applied, and what was set without being asked for."""
    overrides, notes = list(request.overrides), []
    if request.nodes is not None:
        if request.nodes < 1:
            raise ConfigError(f"--nodes {request.nodes}: use 1 or more")
        overrides.append(f"cluster.nodes={request.nodes}")
    source = request.config if request.resume is None else request.resume / "config.yaml"
    if source is None:
        raise ConfigError("redone submit needs a configuration, or --resume RUN_FOLDER")
    if request.resume is not None and overrides:
        raise ConfigError(
            f"--resume submits {request.resume} as it is; leave out {' '.join(overrides)} "
            "(another layout: redone run --resume takes overrides)"
        )
    cfg = load_config(source, overrides)
    if cfg.cluster.nodes > 1 and cfg.weights.channel == "shm":
        if not site.shared:
            raise ConfigError(
                f"--nodes {cfg.cluster.nodes}: weights.channel=shm reaches one node only; set REDONE_SHARED "
                f"in {request.site}, or weights.channel=file and weights.dir"
            )
        folder = f"{site.shared}/weights"
        overrides += ["weights.channel=file", f"weights.dir={folder}"]
        notes.append(f"weights.channel=file, weights.dir={folder}: shared memory reaches one node only")
        cfg = load_config(source, overrides)
    return cfg, notes


def _gate(cfg: Config, request: Request, site: Site) -> tuple[str, list[str]]:
    """(plan as text, warnings). Raises ConfigError when memory does not fit, unless forced."""
    if cfg.cluster.device != "cuda":
        return "", ["cluster.device=cpu: the planner knows GPUs only, so there was no gate"]
    if cfg.rollout.gpus_per_node:
        return "", ["rollout.gpus_per_node cannot be planned, so there was no gate"]
    from redone.planner.report import Options, gate, make_plan, warnings
    from redone.planner.text import render as plan_as_text
    from redone_launcher.plan import read_sizes

    name = request.gpu or site.gpu
    if name is None:
        if request.force:
            return "", ["no gate: neither REDONE_GPU nor --gpu names the GPU (--force)"]
        raise ConfigError(
            f"the planner's gate needs the GPU: set REDONE_GPU=h100 in {request.site} or pass --gpu h100 "
            "(--force submits without)"
        )
    plan = make_plan(cfg, read_sizes(cfg.model.path), Options(nodes=cfg.cluster.nodes, gpu=name))
    problems = gate(plan)
    if problems and not request.force:
        raise ConfigError("the planner refuses this run (--force overrides): " + "; ".join(problems))
    return plan_as_text(plan), [*(f"forced: {p}" for p in problems), *warnings(plan)]


def _fits(cfg: Config, site: Site, found: dict[str, Partition]) -> None:
    """Against what sinfo shows: sbatch would accept some of this and wait for ever."""
    wanted = site.partition or ""
    names = sorted(n for n in found if n)
    if wanted not in found:
        what = f"REDONE_PARTITION={wanted}: no such partition" if wanted else "no default partition"
        raise SlurmError(f"{what}; this cluster has {', '.join(names) or 'none'}")
    partition, c = found[wanted], cfg.cluster
    if c.nodes > partition.nodes:
        raise SlurmError(f"--nodes {c.nodes}: partition {partition.name} has {partition.nodes} nodes")
    if c.device == "cuda" and cfg.node_gpus > partition.gpus:
        raise SlurmError(
            f"{cfg.node_gpus_keys}: the nodes of partition {partition.name} have "
            f"{partition.gpus} GPUs ({', '.join(partition.gres)})"
        )
    if (cpus := _cpus(cfg, site)) > partition.cpus:
        raise SlurmError(
            f"{cpus} CPUs per node: the nodes of partition {partition.name} have {partition.cpus}; set "
            "REDONE_CPUS_PER_NODE"
        )


def _not_queued(run: Path) -> None:
    file = run / JOB_FILE
    if file.exists():
        job = json.loads(file.read_text())["job"]
        state = job_state(job)
        if state is not None and state.live:
            raise RunFolderError(f"{run}: job {job} is {state.state}; redone cancel {run} first")


def _actors_per_node(cfg: Config) -> int:
    return cfg.cluster.gpus_per_node + -(-cfg.rollout.replicas // cfg.cluster.nodes)


def _cpus(cfg: Config, site: Site) -> int:
    return site.cpus_per_node or _actors_per_node(cfg) + 2


def sbatch_options(cfg: Config, site: Site, run: Path) -> list[str]:
    """The #SBATCH lines."""
    c = cfg.cluster
    lines = [
        f"--job-name=redone-{cfg.run.name}",
        f"--nodes={c.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={_cpus(cfg, site)}",
        f"--time={site.time}",
        f"--signal=B:USR1@{site.signal_lead_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={run}/slurm/job-%j.out",
    ]
    for option, value in (
        ("partition", site.partition), ("account", site.account), ("qos", site.qos), ("mem", site.mem)
    ):  # fmt: skip
        if value:
            lines.append(f"--{option}={value}")
    if c.device == "cuda":
        lines.append(f"--gpus-per-node={site.gpu_type + ':' if site.gpu_type else ''}{cfg.node_gpus}")
    return lines + shlex.split(site.sbatch_args)


def render(cfg: Config, site: Site, run: Path, workdir: Path, templates: Path = TEMPLATES) -> str:
    """The job script."""
    environment = _templates(templates)
    mounts = [str(workdir), str(run.parent), cfg.model.path, site.scratch, site.shared, cfg.weights.dir]
    own = dict.fromkeys(str(Path(m).resolve()) for m in mounts if m)
    values: dict[str, Any] = {
        "name": cfg.run.name,
        "version": __version__,
        "nodes": cfg.cluster.nodes,
        "options": sbatch_options(cfg, site, run),
        "run": str(run),
        "workdir": str(workdir),
        "launch": site.launch,
        "python": site.python or (sys.executable if site.launch == "venv" else "python3"),
        "cpus": _cpus(cfg, site),
        "ray_cpus": _actors_per_node(cfg) + 1,
        "object_store_mb": cfg.cluster.ray.object_store_mb,
        "lead": site.signal_lead_s,
        "max_attempts": site.max_attempts,
        "scratch": site.scratch,
        "port_base": site.port_base,
        "mounts": ",".join([*(f"{m}:{m}" for m in own), *([site.mounts] if site.mounts else [])]),
    }
    return environment.get_template("job.sbatch").render(values)


def _templates(folder: Path) -> Environment:
    """Raises ConfigError when slurm/ is not beside the launcher."""
    if not (folder / "job.sbatch").is_file():
        raise ConfigError(f"no templates in {folder}: redone submit runs from a checkout of the repository")
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, comment_start_string="{##", comment_end_string="##}",
    )  # fmt: skip
    environment.filters["sh"] = shlex.quote
    return environment


def _sbatch(script: Path, dependency: str | None) -> str:
    options = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    said = slurm(["sbatch", "--parsable", *options, str(script)])
    match = re.search(r"^(\d+)", said.strip())
    if match is None:
        raise SlurmError(f"sbatch said {said.strip()!r}, which names no job")
    return match.group(1)


def submit_command(request: Request) -> int:
    """Submit and say where things are."""
    os.environ.pop("RAY_ADDRESS", None)
    done = submit(request)
    for note in done.notes:
        sys.stdout.write(f"note: {note}\n")
    if done.job is None:
        sys.stdout.write(
            f"script: {done.script}\nsubmit: redone submit --resume {done.folder} --site SITE_ENV\n"
        )
    else:
        sys.stdout.write(f"job {done.job} submitted: redone status {done.folder}\n")
    return 0
