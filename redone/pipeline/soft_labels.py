"""Soft labels: of several answers of the stage-1 model to a prompt, the one that a judge likes best."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from redone.config.pipeline import LlmJudge, SoftLabelNode
from redone.data.sft import as_context, as_turn
from redone.errors import RedoneError
from redone.pipeline.answers import NO_LOGPROBS, Answers, Sample
from redone.pipeline.rows import write_rows
from redone.reward.judge import JudgeItem, JudgeScore
from redone.reward.judge import LlmJudge as LlmJudgeClient
from redone.types import Completion, Prompt

JUDGED_AT_ONCE = 64  # prompts per call of the judge: its verdicts are kept as they come

Scored = Sequence[float | None]  # of one prompt's samples; None: no verdict


def outside(prompts: Sequence[Prompt], failing: Collection[str]) -> list[Prompt]:
    """Prompts of the tasks that do not fail: the failure set holds the others. All of them, if all fail."""
    return [p for p in prompts if p.task not in failing] or list(prompts)


def verifier_scores(answers: Sequence[Answers]) -> list[list[float | None]]:
    """The task's own reward, which was computed when the answers were made."""
    return [[s.raw if s.status == "ok" else None for s in a.samples] for a in answers]


def judge_scores(
    prompts: Sequence[Prompt],
    answers: Sequence[Answers],
    judge: LlmJudge,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[list[float | None]], dict[str, float]]:
    """(scores of every prompt's samples, the judge's counters).

    Finished verdicts are kept in `cache` and never asked for again. Raises JudgeError when the endpoint stays
    down after its retries, RedoneError when more than judge.max_unread_share of the answers got no verdict.
    """
    client = LlmJudgeClient(judge.model_copy(update={"cache": str(cache)}))
    found: list[list[float | None]] = []
    for start in range(0, len(answers), JUDGED_AT_ONCE):
        part = list(zip(prompts, answers, strict=True))[start : start + JUDGED_AT_ONCE]
        items = [
            JudgeItem(prompt=prompt, completion=_completion(sample))
            for prompt, a in part
            for sample in a.samples
        ]
        scores = iter(asyncio.run(client.score(items)))
        found += [[_value(next(scores)) for _ in a.samples] for _, a in part]
        progress(len(found), len(answers))
    unread = sum(v is None for row in found for v in row)
    total = sum(len(row) for row in found)
    if total and unread / total > judge.max_unread_share:
        raise RedoneError(
            f"{unread} of {total} answers got no verdict from {judge.base_url} ({judge.model}), over "
            f"judge.max_unread_share={judge.max_unread_share}; look at the rubric, or set judge.structured"
        )
    return found, client.counts()


def choose(samples: Sequence[Sample], scores: Scored, node: SoftLabelNode, task: str) -> int | None:
    """Index of the best answer; None when none reaches the threshold. Ties: node.tie, then order."""
    usable = [
        i
        for i, (sample, score) in enumerate(zip(samples, scores, strict=True))
        if score is not None and sample.text.strip() and (sample.finish == "stop" or not node.require_stop)
    ]
    if not usable:
        return None
    best = max(scores[i] or 0.0 for i in usable)
    if best < node.thresholds.get(task, node.threshold):
        return None
    tied = [i for i in usable if scores[i] == best]
    match node.tie:
        case "shortest":
            return min(tied, key=lambda i: (samples[i].tokens, i))
        case "longest":
            return max(tied, key=lambda i: (samples[i].tokens, -i))
        case "likeliest":
            return max(tied, key=lambda i: (samples[i].logprob, -i))
        case "first":
            return tied[0]


def write_labels(
    prompts: Sequence[Prompt],
    answers: Sequence[Answers],
    scores: Sequence[Scored],
    node: SoftLabelNode,
    path: Path,
) -> dict[str, Any]:
    """The kept answers as conversations; returns the manifest."""
    rows: list[dict[str, Any]] = []
    kept: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    best: list[float] = []
    for prompt, a, row in zip(prompts, answers, scores, strict=True):
        tried[a.task] += 1
        chosen = choose(a.samples, row, node, a.task)
        if chosen is None:
            continue
        kept[a.task] += 1
        score = row[chosen]
        assert score is not None
        best.append(score)
        turns = [as_turn(m) for m in as_context(prompt.messages)]
        rows.append(
            {
                "task": a.task,
                "domain": a.domain,
                "messages": [*turns, {"role": "assistant", "content": a.samples[chosen].text}],
                "prompt_id": a.prompt_id,
                "score": score,
                "candidate": chosen,
            }
        )
    write_rows(path, rows)
    verdicts = [v for row in scores for v in row]
    return {
        "prompts": len(answers),
        "labels": len(rows),
        "mean_best_score": fmean(best) if best else None,
        "mean_score": fmean([v for v in verdicts if v is not None])
        if any(v is not None for v in verdicts)
        else None,
        "without_verdict": sum(v is None for v in verdicts),
        "tasks": {t: {"prompts": tried[t], "labels": kept[t]} for t in sorted(tried)},
        "threshold": node.threshold,
        "thresholds": dict(node.thresholds),
        "tie": node.tie,
    }


def _value(score: JudgeScore) -> float | None:
    return score.score if score.status == "ok" else None


def _completion(sample: Sample) -> Completion:
    return Completion(
        token_ids=np.zeros(sample.tokens, np.int32),
        text=sample.text,
        logprobs=NO_LOGPROBS,
        finish=sample.finish,
        versions=(),
    )
