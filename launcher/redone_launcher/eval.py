"""`redone eval`: answers of the engines (no trainer) on suites, recorded one by one, scored and laid out.
`redone eval compare A B`: two such folders, item by item."""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from redone.evaluate.answer import answer_items
from redone.evaluate.page import render
from redone.evaluate.policies import score_policies
from redone.evaluate.records import EvalFolder, replace
from redone.evaluate.results import SuiteResult, plain, suite_result
from redone.evaluate.suite import load_suite, shipped
from redone.evaluate.tables import terminal
from redone.reward.pool import RewardPool, build_rewards
from redone_launcher.compare import compare_command
from redone_launcher.eval_job import Job, prepare, rewards_of
from redone_launcher.training import log_to, versions

PROGRESS_S = 10.0  # seconds between two lines
WIDE = 160


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "redone eval --model PATH --suite NAME[,NAME] [a.b=c ...]; redone eval compare A B"
    parser.add_argument(
        "words", nargs="*", metavar="a.b=c", help="engine settings (docs/config.md: model, rollout, cluster)"
    )
    parser.add_argument("--model", type=Path, help="local Hugging Face folder")
    parser.add_argument("--suite", help="names, .yaml files, or run:RUN_FOLDER[#val], separated by commas")
    parser.add_argument("--list", action="store_true", help="list the suites")
    parser.add_argument("--data", type=Path, help="folder of data sets (default: REDONE_DATA)")
    parser.add_argument("--out", type=Path, help="folder to fill or go on in (default: evals/MODEL)")
    parser.add_argument("--limit", type=int, help="only the first so many items of every file")
    parser.add_argument("--n", type=int, default=1, help="answers per item (needs a temperature)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, help="longest answer, in place of the suites' own")
    parser.add_argument(
        "--embedding", type=Path, help="model folder for QueryGen's cosine (bge-large-en-v1.5)"
    )
    parser.add_argument(
        "--like-paper", action="store_true", help="the paper's rows in the terminal's tables too"
    )
    parser.add_argument("--html", type=Path, help="compare: also write this page")


def eval_command(args: argparse.Namespace) -> int:
    """Raises RedoneError with what to do."""
    if args.words[:1] == ["compare"]:
        return compare_command(args.words[1:], args.html)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)  # a log file has room
    if args.list:
        for name, path in shipped().items():
            suite = load_suite(str(path))
            files = ", ".join(dict.fromkeys(part.data for part in suite.parts))
            console.print(f"[bold]{name}[/bold]  {suite.title}\n  {files}", highlight=False)
        return 0
    job = prepare(args)
    folder = EvalFolder(args.out or Path("evals") / args.model.resolve().name)
    folder.join(job.settings)
    log_to(folder.logs / "driver.log", "info")
    configs = rewards_of(job)
    rewards = build_rewards(configs) if configs else None
    began = time.monotonic()
    try:
        answer(job, folder, rewards, console)
        results = conclude(job, folder, rewards, console)
    finally:
        if rewards is not None:
            rewards.close()
    name = args.model.resolve().name
    write(folder, results, name, job, time.monotonic() - began)
    console.print(terminal(results, name, args.like_paper))
    console.print(f"{folder.path / 'report.html'}", highlight=False)
    return 0


def answer(job: Job, folder: EvalFolder, rewards: RewardPool | None, console: Console) -> None:
    """Generate what is missing; nothing is started when nothing is."""
    left = {name: folder.missing(name, items) for name, items in job.items.items()}
    total, missing = sum(map(len, job.items.values())), sum(map(len, left.values()))
    if total > missing:
        console.print(f"{total - missing} of {total} items are recorded in {folder.path}", highlight=False)
    if not missing:
        return
    from redone.cluster.cluster import RayCluster  # ray takes a second to import: not before the checks

    cluster, finished = None, False
    began = time.monotonic()
    try:
        cluster = RayCluster(
            job.cfg, folder.logs, lambda text: console.print(text, style="dim"), with_trainers=False
        )
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, _interrupt)
        console.print(f"engine ready after {time.monotonic() - began:.0f} s", style="dim", highlight=False)
        for name, items in left.items():
            if items:
                with folder.writer(name) as writer:
                    progress = _progress(console, name, len(items))
                    answer_items(
                        items, cluster.engines(), rewards, job.measures[name], job.asking, writer, progress
                    )
        finished = True
    finally:
        if cluster is not None:
            cluster.close(graceful=finished)


def conclude(job: Job, folder: EvalFolder, rewards: RewardPool | None, console: Console) -> list[SuiteResult]:
    """Scores, intervals, and the policies that know nothing, for the items asked for now."""
    results = []
    for name, suite in job.suites.items():
        console.print(f"{name}: scores, intervals, answers that know nothing", style="dim", highlight=False)
        measures = job.measures[name]
        results.append(
            suite_result(
                suite,
                job.items[name],
                folder.read(name),
                measures,
                lambda part, items, by_part=measures: score_policies(part, items, rewards, by_part[part.id]),  # type: ignore[misc]
            )
        )
    return results


def write(folder: EvalFolder, results: Sequence[SuiteResult], name: str, job: Job, seconds: float) -> None:
    """summary.json and report.html."""
    plainly = {k: v for k, v in job.settings.items() if k not in ("suites", "format", "model")}
    facts = {
        **{f"model {k}": v for k, v in job.settings["model"].items()},
        **plainly,
        "device": job.cfg.cluster.device,
        "engine context (tokens)": job.cfg.model.max_model_len,
        "seconds of this call": round(seconds, 1),
        **versions(),
    }
    summary = {"model": name, "facts": facts, "suites": plain(results)}
    replace(folder.path / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1))
    replace(folder.path / "report.html", render(results, name, facts))


def _progress(console: Console, name: str, total: int) -> Callable[[int], None]:
    """Prints now and then, and at the end."""
    began = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= PROGRESS_S:
            last = now
            text = f"{name}: {done} of {total} items, {now - began:.0f} s"
            console.print(text, style="dim", highlight=False)

    return report


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(f"signal {number}")
