"""Greedy (or sampled) answers of the engines on fixed prompts, scored, one record per prompt.

The records are the result: comparisons are paired on them, and summaries are derived from them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redone.algo.stats import wilson_interval
from redone.api import EngineFleet, Scorer
from redone.config.schema import EvalSampling
from redone.types import Completion, Prompt, Sampling, Score

CONCURRENCY = 64  # prompts in flight: enough to fill an engine's batch, few enough to bound memory
MAX_LABELS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One prompt and its n answers. Shares are over the answers whose reward did not fail."""

    prompt_id: str
    task: str
    reference: str  # a text as it stands; anything else as JSON
    outputs: tuple[str, ...]
    correct: float  # share of correct answers: 0 or 1 with one sample
    score: float  # mean raw reward, in [0, 1]
    finishes: tuple[str, ...]
    format_errors: int = 0  # answers outside the task's label set, or not stopped
    failed: int = 0  # answers whose reward failed: no statement about the model
    tokens: int = 0  # of all answers

    @property
    def usable(self) -> bool:
        return self.failed < len(self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSummary:
    """`interval` is Wilson's 95 % interval of `accuracy`, with items (not samples) as trials."""

    n: int  # items with at least one answer that could be scored
    failed: int  # answers whose reward failed
    accuracy: float
    interval: tuple[float, float]
    mean_score: float
    format_errors: float  # share of answers
    per_class: Mapping[str, tuple[int, float]]  # label -> (items, accuracy); empty without a label set
    common_answer: str
    common_share: float  # share of answers equal to it: near 1 on a multi-class task means collapse
    mean_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    items: tuple[Item, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.task for item in self.items))

    def summary(self, task: str | None = None) -> TaskSummary:
        """Of one task, or of all items together."""
        return summarise([item for item in self.items if task is None or item.task == task])

    @property
    def mean_score(self) -> float:
        """Mean over tasks of the mean raw reward: what keep_best compares, so that no large task decides
        alone."""
        means = [self.summary(task).mean_score for task in self.tasks()]
        return sum(means) / len(means) if means else 0.0

    def write(self, folder: str | Path, name: str) -> Path:
        """<name>.jsonl (one item a line) and <name>.summary.json, each atomically. Returns the former's
        path."""
        target = Path(folder) / f"{name}.jsonl"
        _replace(target, "".join(json.dumps(asdict(i), ensure_ascii=False) + "\n" for i in self.items))
        tasks = {task: asdict(self.summary(task)) for task in self.tasks()}
        summary = {
            "meta": dict(self.meta),
            "mean_score": self.mean_score,
            "all": asdict(self.summary()),
            "tasks": tasks,
        }
        _replace(target.with_suffix(".summary.json"), json.dumps(summary, ensure_ascii=False, indent=1))
        return target


def read_evaluation(path: str | Path) -> Evaluation:
    """The inverse of Evaluation.write (path of the .jsonl file)."""
    items = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        items.append(
            Item(**{**values, "outputs": tuple(values["outputs"]), "finishes": tuple(values["finishes"])})
        )
    summary = json.loads(Path(path).with_suffix(".summary.json").read_text(encoding="utf-8"))
    return Evaluation(items=tuple(items), meta=summary["meta"])


def evaluate(
    prompts: Sequence[Prompt],
    engines: EngineFleet,
    rewards: Scorer,
    sampling: Sampling,
    *,
    n: int = 1,
    seed: int = 0,
    concurrency: int = CONCURRENCY,
    meta: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Generate n answers per prompt (at most `concurrency` prompts at once) and score them.

    The seeds depend on (seed, prompt id, sample index) only, so two policies answer under equal noise.
    Errors of engines propagate; a failed reward is recorded in the item.
    """
    labels = label_sets(prompts)
    items = asyncio.run(_answer_all(prompts, engines, rewards, sampling, n, seed, concurrency, labels))
    return Evaluation(items=tuple(items), meta=dict(meta or {}))


def sampling_of(config: EvalSampling, max_response_length: int, stop_token_ids: Sequence[int]) -> Sampling:
    """The engine's parameters for config.evaluate.sampling."""
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens or max_response_length,
        stop_token_ids=tuple(stop_token_ids),
    )


async def _answer_all(
    prompts: Sequence[Prompt],
    engines: EngineFleet,
    rewards: Scorer,
    sampling: Sampling,
    n: int,
    seed: int,
    concurrency: int,
    labels: Mapping[str, tuple[str, ...]],
) -> list[Item]:
    gate = asyncio.Semaphore(concurrency)

    async def answer(prompt: Prompt) -> Item:
        async with gate:
            seeds = [sample_seed(seed, prompt.id, i) for i in range(n)]
            completions = await engines.generate(
                prompt.token_ids.tolist(), sampling.within(prompt.max_tokens), seeds
            )
            scores = await rewards.score_group(prompt, completions)
        return make_item(prompt, completions, scores, labels.get(prompt.task))

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(prompt)) for prompt in prompts]
    except BaseExceptionGroup as errors:
        # The first failure cancels the rest; callers expect that error itself, not a group around it.
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def make_item(
    prompt: Prompt, completions: Sequence[Completion], scores: Sequence[Score], labels: Sequence[str] | None
) -> Item:
    """`labels`: the normalised label set of the prompt's task, or None where answers are free text."""
    usable = [score for score in scores if score.status == "ok"]
    errors = sum(
        not score.correct and _is_format_error(completion, score, labels)
        for completion, score in zip(completions, scores, strict=True)
        if score.status == "ok"
    )
    return Item(
        prompt_id=prompt.id,
        task=prompt.task,
        reference=reference_text(prompt.reference),
        outputs=tuple(c.text for c in completions),
        correct=_mean(float(s.correct) for s in usable),
        score=_mean(s.raw for s in usable),
        finishes=tuple(c.finish for c in completions),
        format_errors=errors,
        failed=len(scores) - len(usable),
        tokens=sum(len(c.token_ids) for c in completions),
    )


def _is_format_error(completion: Completion, score: Score, labels: Sequence[str] | None) -> bool:
    if completion.finish != "stop":
        return True
    # An exact reward's detail is the answer it extracted, which need not be the whole text.
    return labels is not None and not {normalise(completion.text), normalise(score.detail)} & set(labels)


def summarise(items: Sequence[Item]) -> TaskSummary:
    """Statistics of items (of one task, usually); see TaskSummary."""
    usable = [item for item in items if item.usable]
    answers = Counter(normalise(text) for item in items for text in item.outputs)
    total = sum(answers.values())
    common, count = answers.most_common(1)[0] if answers else ("", 0)
    accuracy = _mean(item.correct for item in usable)
    classes: dict[str, list[float]] = defaultdict(list)
    for item in usable:
        classes[item.reference].append(item.correct)
    labelled = is_label_set(len(classes), len(usable))
    return TaskSummary(
        n=len(usable),
        failed=sum(item.failed for item in items),
        accuracy=accuracy,
        interval=wilson_interval(round(accuracy * len(usable)), len(usable)) if usable else (0.0, 1.0),
        mean_score=_mean(item.score for item in usable),
        format_errors=sum(item.format_errors for item in items) / max(1, total),
        per_class={k: (len(v), _mean(v)) for k, v in sorted(classes.items())} if labelled else {},
        common_answer=common,
        common_share=count / max(1, total),
        mean_tokens=sum(item.tokens for item in items) / max(1, total),
    )


def label_sets(prompts: Sequence[Prompt]) -> dict[str, tuple[str, ...]]:
    """task -> its normalised labels, for tasks whose references are a few texts that repeat."""
    references: dict[str, list[str]] = defaultdict(list)
    for prompt in prompts:
        references[prompt.task].append(normalise(reference_text(prompt.reference)))
    return {
        task: tuple(sorted(set(found)))
        for task, found in references.items()
        if is_label_set(len(set(found)), len(found))
    }


def is_label_set(labels: int, items: int) -> bool:
    """A classification task: 2 to MAX_LABELS different references, each seen twice on average."""
    return 2 <= labels <= MAX_LABELS and items >= 2 * labels


def reference_text(reference: Any) -> str:
    return reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False, default=str)


def normalise(text: str) -> str:
    """An answer as a label: case folded, blanks and ASCII punctuation dropped at both ends."""
    return text.strip().strip(string.punctuation + string.whitespace).casefold()


def sample_seed(seed: int, prompt_id: str, index: int) -> int:
    """31 bits of a hash, the same in every process (Python's own hash is not)."""
    digest = hashlib.blake2b(f"evaluate/{seed}/{prompt_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 33


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _replace(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
