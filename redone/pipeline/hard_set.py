"""The prompts that stage 3 trains on: solved sometimes, by pass rates measured before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redone.config.pipeline import HardSetNode, MixSource
from redone.config.schema import Config
from redone.data.mix import mix
from redone.errors import DataError
from redone.pipeline.answers import Answers
from redone.pipeline.rows import known_rows, rank, write_rows


def choose_hard(answers: Sequence[Answers], node: HardSetNode, seed: int) -> tuple[list[str], int]:
    """(prompt ids with low < mean score < high, how many of them were added to reach min_rows).

    Prompts are added nearest to a mean score of one half first, ties by seed.
    """
    rates = {a.prompt_id: a.mean_score for a in answers if a.usable()}
    hard = [i for i, rate in rates.items() if node.low < rate < node.high]
    missing = max(0, min(node.min_rows, len(rates)) - len(hard))
    rest = sorted(set(rates) - set(hard), key=lambda i: (abs(rates[i] - 0.5), rank(seed, "hard", i)))
    return hard + rest[:missing], missing


def write_hard_set(
    answers: Sequence[Answers], files: Sequence[str], node: HardSetNode, cfg: Config, seed: int, folder: Path
) -> dict[str, Any]:
    """rows.jsonl and what was chosen. `files`: where the answered prompts came from. Raises DataError when no
    prompt is hard and none may be added."""
    chosen, added = choose_hard(answers, node, seed)
    if not chosen:
        raise DataError(
            f"none of {len(answers)} prompts has a mean score between {node.low} and {node.high}: the model "
            "solves each always or never; widen low and high, or set min_rows"
        )
    wanted = set(chosen)
    rates = {a.prompt_id: a.mean_score for a in answers}
    hard = folder / "hard.jsonl"
    rows = (
        {"drawn_from": k.row.place, **k.values, "mean_score": rates[k.id]}
        for k in known_rows(files, cfg)
        if k.id in wanted
    )
    found = write_rows(hard, rows)
    if found != len(wanted):
        raise DataError(
            f"{found} of {len(wanted)} hard prompts stand in {', '.join(files)}; the files changed"
        )
    source = MixSource(files=(str(hard),))
    drawn = mix([source], node.draw, seed, folder / "rows.jsonl")
    hard.unlink()
    easy = sum(a.mean_score >= node.high for a in answers if a.usable())
    return {
        "measured": len(answers),
        "always": easy,
        "never": sum(a.mean_score <= node.low for a in answers if a.usable()),
        "hard": len(chosen) - added,
        "added": added,
        **drawn.manifest([source], node.draw, seed),
    }
