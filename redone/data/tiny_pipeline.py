"""Rows for configs/tiny/pipeline.yaml and sft.yaml: three toy tasks of random letters, split and disjoint."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# task -> (domain, capability, what the answer is): the model must write much of one letter, or the first
# letter of the text.
TASKS = {
    "much_a": ("sns", "writing"),
    "much_b": ("general", "writing"),
    "first": ("sns", "reading"),
}
SIZES = {"train": 48, "val": 10, "test": 12}
FIRST_LETTERS = "xyz"


def write_tiny_pipeline(folder: Path, seed: int = 0) -> None:
    """train.jsonl, val.jsonl, test.jsonl (all tasks) and general.jsonl (training prompts of much_b)."""
    draw = random.Random(seed)
    seen: set[str] = set()
    for split, size in SIZES.items():
        rows = [row for task in TASKS for row in _rows(task, split, size, draw, seen)]
        _write(folder / f"{split}.jsonl", rows)
        if split == "train":
            _write(folder / "general.jsonl", [r for r in rows if r["domain"] == "general"])
            _write(folder / "sft.jsonl", [{**r, "response": r["reward_model"]["ground_truth"]} for r in rows])


def _rows(task: str, split: str, size: int, draw: random.Random, seen: set[str]) -> Iterator[dict[str, Any]]:
    domain, capability = TASKS[task]
    for index in range(size):
        text = ""
        while not text or text in seen:
            text = draw.choice(FIRST_LETTERS) + "".join(
                draw.choices(string.ascii_lowercase, k=draw.randint(4, 9))
            )
        seen.add(text)
        reference = text[0] if task == "first" else task[-1]
        yield {
            "data_source": "tiny",
            "task": task,
            "domain": domain,
            "prompt": [{"role": "user", "content": f"{task[0]} {text}"}],
            "reward_model": {"style": "rule", "ground_truth": reference},
            "rationale": "" if index % 2 else f"{reference} it is",
            "extra_info": {"split": split, "index": index, "capability": capability},
        }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
