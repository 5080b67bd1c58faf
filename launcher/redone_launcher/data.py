"""`redone data`: the quickstart's model and data, public data sets, and the audit of a run's ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from redone.errors import RunFolderError

PARTS = ("smollm2", "tweets", "tasks", "tiny")


def prepare(dest: Path, only: Sequence[str] | None) -> int:
    """Fill `dest` with the folders of PARTS. What is there is left alone. Raises DataError."""
    from redone.data.prepare import (
        prepare_tiny,
        prepare_tiny_pipeline,
        prepare_tweet_tasks,
        prepare_tweets,
    )
    from redone.data.smollm2 import prepare_smollm2

    downloads = dest / "downloads"
    makers: dict[str, Callable[[], Path]] = {
        "smollm2": lambda: prepare_smollm2(dest / "smollm2-135m-instruct", downloads),
        "tweets": lambda: prepare_tweets(dest / "tweets", downloads),
        "tasks": lambda: prepare_tweet_tasks(dest / "tweet-tasks", downloads),
        "tiny": lambda: prepare_tiny_pipeline(prepare_tiny(dest / "tiny").parent / "tiny-pipeline").parent,
    }
    for part in only or PARTS:
        print(f"{part} ...", flush=True)
        start = time.monotonic()
        made = makers[part]()
        print(f"{part}: {made} ({time.monotonic() - start:.0f} s)")
    return 0


def fetch(name: str | None, dest: Path) -> int:
    """Download one public data set into `dest`/<name>; without a name, list them."""
    from redone.data.fetch import DATASETS, fetch_dataset

    if name is None:
        for known in DATASETS.values():
            print(f"{known.name:<10} {known.licence:<12} {known.about}")
        return 0
    for path in fetch_dataset(name, dest / name):
        print(path)
    return 0


def audit(folder: Path) -> int:
    """Print the problems of `folder`/ledger.jsonl, or of all nodes of a pipeline; 1 when there is one.

    A pipeline: every ledger, and in every file of answers each prompt once.
    """
    from redone.data.ledger import audit as audit_ledger
    from redone.pipeline.answers import repeated_prompts

    found = {ledger: audit_ledger(ledger) for ledger in sorted(folder.glob("nodes/*/run/ledger.jsonl"))}
    for name in ("answers", "candidates"):
        answers = sorted(folder.glob(f"nodes/*/{name}.jsonl"))
        found |= {path: repeated_prompts(path) for path in answers}
    if (folder / "ledger.jsonl").is_file():
        found[folder / "ledger.jsonl"] = audit_ledger(folder / "ledger.jsonl")
    if not found:
        raise RunFolderError(f"{folder} has no ledger.jsonl; give the folder that `redone run` made")
    for path, problems in found.items():
        for problem in problems:
            print(problem)
        lines = sum(1 for _ in path.open(encoding="utf-8"))
        print(f"{path}: {lines} records, {len(problems)} problems")
    return 1 if any(found.values()) else 0
