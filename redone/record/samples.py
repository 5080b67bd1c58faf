"""samples.jsonl: a few rollouts of every step, as a person would want to read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redone.types import Group, Rollout


def pick(groups: Sequence[Group], count: int) -> list[Rollout]:
    """`count` rollouts, by rule not by chance: spread over the groups, in turn the best and the
    worst of its group (what the step learned from)."""
    if not groups or count <= 0:
        return []
    chosen = []
    stride = max(1, len(groups) // count)
    for i in range(count):
        group = groups[(i * stride) % len(groups)]
        ranked = sorted(group.rollouts, key=lambda r: r.score.raw)
        turn, lap = i % 2, (i * stride) // len(groups)
        if lap < len(ranked):
            chosen.append(ranked[-1 - lap] if turn == 0 else ranked[lap])
    return chosen


class SampleWriter:
    """Appends to `path`; flushed per line."""

    def __init__(self, path: Path, per_step: int) -> None:
        self._per_step = per_step
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, groups: Sequence[Group]) -> None:
        for rollout in pick(groups, self._per_step):
            self._file.write(json.dumps(record_of(step, rollout), ensure_ascii=False, default=str) + "\n")

    def close(self) -> None:
        self._file.close()


def record_of(step: int, rollout: Rollout) -> dict[str, Any]:
    """One line of samples.jsonl."""
    prompt, completion, score = rollout.prompt, rollout.completion, rollout.score
    return {
        "step": step,
        "prompt_id": prompt.id,
        "task": prompt.task,
        "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "reference": prompt.reference,
        "response": completion.text,
        "tokens": len(completion.token_ids),
        "finish": completion.finish,
        "raw": score.raw,
        "value": score.value,
        "correct": score.correct,
        "status": score.status,
        "detail": score.detail,
        "versions": [[span.version, span.start, span.end] for span in completion.versions],
    }
