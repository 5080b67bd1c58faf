"""Answers of the engines to the items that have no record yet; every finished item is on disk at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from redone.api import EngineFleet, Scorer
from redone.evaluate.items import EvalItem, answer_of
from redone.evaluate.measures import Measure
from redone.evaluate.records import Record, RecordWriter
from redone.evaluate.runner import CONCURRENCY, sample_seed
from redone.types import Completion, Sampling, Score

Measures = Mapping[str, Mapping[str, Measure]]  # part -> metric -> measure
UNFIT = "unfit"
NO_IDS = np.zeros(0, np.int32)
NO_LOGPROBS = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How answers are drawn."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int | None  # for every part; else each part's own
    stop_token_ids: tuple[int, ...]
    limit: int  # tokens that the engine takes, prompt and answer together

    def longest(self, item: EvalItem) -> int:
        """Tokens of answer that fit: 0 or less when the prompt fills the context."""
        wanted = self.max_tokens or item.part.max_tokens
        return min(wanted, self.limit - len(item.prompt.token_ids))

    def sampling(self, item: EvalItem) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.longest(item),
            stop_token_ids=self.stop_token_ids,
        )


def answer_items(
    items: Sequence[EvalItem],
    engines: EngineFleet,
    rewards: Scorer | None,
    measures: Measures,
    asking: Asking,
    writer: RecordWriter,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Generate, score and record. `progress` is called with the number of items done. The first error ends
    it; what is recorded stays."""
    asyncio.run(_all(items, engines, rewards, measures, asking, writer, progress))


async def _all(
    items: Sequence[EvalItem],
    engines: EngineFleet,
    rewards: Scorer | None,
    measures: Measures,
    asking: Asking,
    writer: RecordWriter,
    progress: Callable[[int], None],
) -> None:
    gate, done = asyncio.Semaphore(CONCURRENCY), 0

    async def one(item: EvalItem) -> None:
        nonlocal done
        async with gate:
            completions = await _generate(item, engines, asking)
            writer.add(await make_record(item, completions, rewards, measures[item.part.id]))
        done += 1
        progress(done)

    try:
        async with asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(one(item))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _generate(item: EvalItem, engines: EngineFleet, asking: Asking) -> list[Completion]:
    if asking.longest(item) < 1:
        return [completion_of("")] * asking.n
    seeds = [sample_seed(asking.seed, item.prompt.id, i) for i in range(asking.n)]
    return await engines.generate(item.prompt.token_ids.tolist(), asking.sampling(item), seeds)


async def make_record(
    item: EvalItem,
    completions: Sequence[Completion],
    rewards: Scorer | None,
    measures: Mapping[str, Measure],
) -> Record:
    answers = [
        replace(c, text=answer_of(c.text, item.part.extract) if len(c.token_ids) else "") for c in completions
    ]
    found = {name: await score_answers(item, answers, rewards, name, m) for name, m in measures.items()}
    return Record(
        part=item.part.id,
        id=item.prompt.id,
        index=item.index,
        prompt_tokens=len(item.prompt.token_ids),
        outputs=tuple(c.text for c in completions),
        finishes=tuple(c.finish if len(c.token_ids) else UNFIT for c in completions),
        tokens=tuple(len(c.token_ids) for c in completions),
        stats={name: stats for name, (stats, _, _) in found.items()},
        failed={name: failed for name, (_, failed, _) in found.items() if failed},
        details={name: texts for name, (_, _, texts) in found.items() if any(texts)},
    )


async def score_answers(
    item: EvalItem, answers: Sequence[Completion], rewards: Scorer | None, name: str, measure: Measure
) -> tuple[tuple[tuple[float, ...], ...], int, tuple[str, ...]]:
    """(numbers per answer, answers whose reward failed, what the first reading says of each)."""
    key = f"{item.suite}/{item.part.id}/{name}"
    by_reading: dict[str, list[Score]] = {}
    for reading in measure.readings:
        assert rewards is not None
        prompt = replace(item.prompt, reward=f"{key}/{reading}" if reading else key)
        by_reading[reading] = await rewards.score_group(prompt, answers)
    stats, failed, details = [], 0, []
    for n, answer in enumerate(answers):
        scores = {reading: found[n] for reading, found in by_reading.items()}
        stats.append(tuple(float(v) for v in measure.tally(answer.text, item, scores)))
        failed += any(score.status != "ok" for score in scores.values())
        details.append(next((score.detail[:200] for score in scores.values()), ""))
    return tuple(stats), failed, tuple(details)


def completion_of(text: str) -> Completion:
    """A text that no model said."""
    return Completion(token_ids=NO_IDS, text=text, logprobs=NO_LOGPROBS, finish="stop", versions=())
