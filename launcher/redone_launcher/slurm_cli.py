"""Arguments of the commands for SLURM: submit, status, logs, cancel, and what a job itself runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add_slurm_commands(commands: Any) -> None:
    """`commands`: what ArgumentParser.add_subparsers returned."""
    submit = commands.add_parser("submit", help="queue a run with SLURM (docs/slurm.md)")
    submit.add_argument("config", nargs="?", help="YAML file (not with --resume)")
    submit.add_argument("overrides", nargs="*", metavar="a.b=c", help="override a key of the configuration")
    submit.add_argument("--nodes", type=int, metavar="N", help="sets cluster.nodes")
    submit.add_argument(
        "--site", type=Path, default=Path(os.environ.get("REDONE_SITE", "site.env")), metavar="FILE",
        help="what the cluster is like (default: REDONE_SITE, else site.env)",
    )  # fmt: skip
    submit.add_argument("--dry-run", action="store_true", help="write the run folder and the script only")
    submit.add_argument("--force", action="store_true", help="submit although the planner refuses")
    submit.add_argument("--gpu", help="the planner's GPU (default: REDONE_GPU of site.env)")
    submit.add_argument("--dependency", metavar="SPEC", help="sbatch's, e.g. afterok:123")
    submit.add_argument("--resume", type=Path, metavar="RUN_FOLDER", help="queue a run folder again")
    submit.set_defaults(run=_submit)

    for name, text in (
        ("status", "a submitted run: job, attempts, step"),
        ("cancel", "end a submitted run's job"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path, metavar="RUN_FOLDER")
        command.set_defaults(run=_status if name == "status" else _cancel)
    logs = commands.add_parser("logs", help="the end of a submitted run's logs")
    logs.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    logs.add_argument("name", nargs="?", help="a file of logs/latest (default: driver.out)")
    logs.add_argument("-n", "--lines", type=int, default=40)
    logs.set_defaults(run=_logs)

    preflight = commands.add_parser("preflight", help="check the nodes of a job (run by the job on each)")
    preflight.add_argument("folder", type=Path, help="where nodes write what they found; on the shared files")
    preflight.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="RUN_FOLDER")
    preflight.set_defaults(run=_preflight)
    node = commands.add_parser("node", help="one Ray node of a job (run by the job on each)")
    node.add_argument("--head", action="store_true")
    node.add_argument("--scratch", default="/tmp")
    node.add_argument("--cpus", type=int, required=True)
    node.add_argument("--object-store-mb", type=int, required=True)
    node.add_argument("--address-file", type=Path, required=True)
    node.set_defaults(run=_node)
    for command in (preflight, node):
        command.add_argument("--nodes", required=True, help="names, comma separated; the first is the head")
        command.add_argument("--ports", type=int, required=True, help="first port of the job's window")
    attempt = commands.add_parser("attempt", help="one attempt at a submitted run (run by the job)")
    attempt.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    attempt.set_defaults(run=_attempt)


def _submit(args: argparse.Namespace) -> int:
    from redone_launcher.submit import Request, submit_command

    config, overrides = args.config, list(args.overrides)
    if args.resume is not None and config is not None:
        config, overrides = None, [config, *overrides]
    return submit_command(
        Request(
            config=Path(config) if config is not None else None,
            overrides=tuple(overrides),
            nodes=args.nodes,
            site=args.site,
            resume=args.resume,
            dry_run=args.dry_run,
            force=args.force,
            gpu=args.gpu,
            dependency=args.dependency,
        )
    )


def _status(args: argparse.Namespace) -> int:
    from redone_launcher.jobs import status

    return status(args.folder)


def _cancel(args: argparse.Namespace) -> int:
    from redone_launcher.jobs import cancel

    return cancel(args.folder)


def _logs(args: argparse.Namespace) -> int:
    from redone_launcher.jobs import logs

    return logs(args.folder, args.name, args.lines)


def _preflight(args: argparse.Namespace) -> int:
    from redone_launcher.preflight import preflight

    return preflight(args.folder, args.nodes.split(","), args.run_folder, args.ports)


def _node(args: argparse.Namespace) -> int:
    from redone_launcher.ray_node import NodeOptions, run_node

    return run_node(
        NodeOptions(
            nodes=tuple(args.nodes.split(",")),
            ports=args.ports,
            scratch=args.scratch,
            cpus=args.cpus,
            object_store_mb=args.object_store_mb,
            address_file=args.address_file,
            head=args.head,
        )
    )


def _attempt(args: argparse.Namespace) -> int:
    from redone_launcher.run import attempt_command

    attempt_command(args.folder)
    return 0
