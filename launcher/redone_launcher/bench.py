"""`redone bench PART CONFIG`: measure one part of a configuration's work; `redone bench compare A B`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redone.bench.measure import Figure, Repeats
    from redone.bench.work import WorkOptions
    from redone.cluster.cluster import RayCluster
    from redone.config.schema import Config
    from redone_launcher.training import Inputs

log = logging.getLogger(__name__)

PARTS = ("rollout", "train", "sync", "reward", "pack", "e2e")
EXIT_WORSE = 1


def add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    """One sub-command per part, `all`, and `compare`. Imports nothing heavy: `--help` answers at once."""
    parts = bench.add_subparsers(dest="part", metavar="PART", required=True)
    for name in (*PARTS, "all"):
        part = parts.add_parser(name, help=f"measure {name}" if name != "all" else "every part, one start")
        part.add_argument("config", help="YAML file")
        part.add_argument("overrides", nargs="*", metavar="a.b=c", help="override a key of the configuration")
        part.add_argument(
            "--out", type=Path, metavar="FILE", help="JSON (default: runs/bench/PART-NAME.json)"
        )
        part.add_argument("--repeats", type=int, default=5, metavar="N", help="timed calls (default 5)")
        part.add_argument("--warmup", type=int, default=1, metavar="N", help="untimed calls before (1)")
        part.add_argument("--prompts", choices=("synthetic", "data"), default="synthetic")
        part.add_argument("--prompt-tokens", type=int, metavar="N", help="of a synthetic prompt")
        part.add_argument("--response-tokens", type=float, metavar="N", help="mean response")
        part.add_argument("--sigma", type=float, default=0.8, metavar="S", help="of log lengths; 0: equal")
        part.add_argument(
            "--lengths", dest="lengths_file", metavar="FILE", help="observed response lengths, one a line"
        )
        part.add_argument("--allow-dirty", action="store_true", help="measure uncommitted code, and mark it")
    compare = parts.add_parser("compare", help="which figures of B are worse than A's beyond noise (exit 1)")
    compare.add_argument("a", type=Path)
    compare.add_argument("b", type=Path)
    compare.add_argument(
        "--smallest", type=float, default=0.05, metavar="X", help="relative change never called (0.05)"
    )
    bench.set_defaults(run=bench_command)


def bench_command(args: argparse.Namespace) -> int:
    return _compare(args) if args.part == "compare" else _measure(args)


def _compare(args: argparse.Namespace) -> int:
    from redone.bench.compare import compare, differences, table
    from redone.bench.result import read_result

    a, b = read_result(args.a), read_result(args.b)
    changes = compare(a, b, args.smallest)
    for line in differences(a, b):
        sys.stdout.write(f"note: {line}\n")
    sys.stdout.write(table(changes) + "\n")
    return EXIT_WORSE if any(c.verdict == "worse" for c in changes) else 0


def _measure(args: argparse.Namespace) -> int:
    from redone.bench.measure import Repeats
    from redone.bench.parts import WITHOUT_CLUSTER, Bench, run_part
    from redone.bench.result import BenchResult, commit_of, require_clean, table
    from redone.bench.roofline import roofline
    from redone.bench.work import WorkOptions
    from redone_launcher.training import versions

    commit = commit_of()
    require_clean(commit, args.allow_dirty)
    repeats = Repeats(warmup=args.warmup, timed=args.repeats)
    parts = PARTS if args.part == "all" else (args.part,)
    options = WorkOptions(
        prompts=args.prompts,
        prompt_tokens=args.prompt_tokens,
        response_tokens=args.response_tokens,
        sigma=args.sigma,
        lengths_file=args.lengths_file,
    )
    cfg, inputs, hf = _prepare(args, options, repeats)
    load = os.getloadavg()[0]
    threads = _threads(cfg)
    before = roofline(cfg.cluster.device, cfg.model.dtype, threads)
    roof = before.scaled(cfg.cluster.world_size)
    figures: list[Figure] = []
    try:
        with _cluster(cfg, set(parts) <= set(WITHOUT_CLUSTER)) as cluster:
            bench = Bench(
                cfg=cfg,
                hf=hf,
                options=options,
                repeats=repeats,
                roof=roof,
                data=inputs.train,
                stop_token_ids=inputs.chat.stop_token_ids,
                rewards=inputs.rewards,
                trainer=cluster.trainers() if cluster else None,
                engines=cluster.engines() if cluster else None,
            )
            for part in parts:
                sys.stderr.write(f"redone bench: {part}\n")
                figures += run_part(part, bench)
    finally:
        inputs.rewards.close()
    result = BenchResult(
        parts=tuple(parts),
        commit=commit.id,
        dirty=bool(commit.dirty) or not commit.id,
        versions=versions(),
        device=_device(cfg, before.device, load),
        config=cfg.model_dump(mode="json"),
        options={**asdict(options), **asdict(repeats)},
        rooflines={"start": before, "end": roofline(cfg.cluster.device, cfg.model.dtype, threads)},
        figures=tuple(figures),
        notes=inputs.notes,
    )
    out = args.out or Path(cfg.run.dir) / "bench" / f"{args.part}-{cfg.run.name}.json"
    result.write(out)
    sys.stdout.write(table(result) + f"\n{out}\n")
    return 0


def _prepare(
    args: argparse.Namespace, options: WorkOptions, repeats: Repeats
) -> tuple[Config, Inputs, dict[str, Any]]:
    """(configuration with fixed work, inputs, config.json). Raises RedoneError as `redone run` would."""
    from redone.bench.work import group_lengths
    from redone.config.check import read_model_config
    from redone.config.load import load_config
    from redone_launcher.training import load_inputs

    cfg = load_config(args.config, args.overrides)
    fixed = [
        f"rollout.forced_lengths={json.dumps(group_lengths(cfg, options))}",
        "algorithm.filter_groups.enable=false",
        "weights.canary.every=0",
        f"algorithm.total_steps={max(cfg.algorithm.total_steps, 2 * (repeats.warmup + repeats.timed))}",
    ]
    if options.prompt_tokens and options.prompt_tokens > cfg.data.max_prompt_length:
        fixed.append(f"data.max_prompt_length={options.prompt_tokens}")
    cfg = load_config(args.config, [*args.overrides, *fixed])
    return cfg, load_inputs(cfg), read_model_config(cfg.model.path)


def _threads(cfg: Config) -> int:
    """CPU threads that the run's processes can use at once."""
    wanted = max(
        cfg.cluster.world_size * cfg.trainer.num_threads,
        cfg.rollout.replicas * cfg.rollout.engine.num_threads,
    )
    return max(1, min(len(os.sched_getaffinity(0)), wanted))


def _device(cfg: Config, name: str, load: float) -> dict[str, Any]:
    return {
        "kind": cfg.cluster.device,
        "name": name,
        "cores": len(os.sched_getaffinity(0)),
        "ranks": cfg.cluster.world_size,
        "engines": cfg.rollout.replicas,
        "load": load,  # before the benchmark
    }


@contextmanager
def _cluster(cfg: Config, unneeded: bool) -> Iterator[RayCluster | None]:
    """The cluster that a run starts, or None. Its logs stay, and are named, after a failure."""
    if unneeded:
        yield None
        return
    from redone.cluster.cluster import RayCluster

    logs = Path(tempfile.mkdtemp(prefix="redone-bench-"))
    cluster = None
    try:
        cluster = RayCluster(cfg, logs, lambda text: log.info("%s", text))
        yield cluster
    except BaseException:
        sys.stderr.write(f"redone bench: logs of the processes: {logs}\n")
        raise
    else:
        shutil.rmtree(logs, ignore_errors=True)
    finally:
        if cluster is not None:
            cluster.close(graceful=True)
