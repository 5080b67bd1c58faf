"""Scored answers of a model to prompts, appended to a file as they come: a kill loses only what is in flight.

Lines stand in the order of the prompts. Seeds depend on (seed, prompt id, sample) alone, so answers after a
restart are those that the uninterrupted run would have written.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np

from redone.api import EngineFleet, Scorer
from redone.data.prompts import PromptSet
from redone.errors import DataError, RedoneError
from redone.evaluate.runner import Evaluation, label_sets, make_item, reference_text, sample_seed
from redone.types import Completion, Finish, Prompt, Sampling, Score, ScoreStatus

Item = TypeVar("Item")
Result = TypeVar("Result")
CONCURRENCY = 64  # prompts in flight
NO_IDS = np.zeros(0, np.int32)
NO_LOGPROBS = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer. `ids`: digest of its token ids, to tell whether two runs generated the same."""

    text: str
    ids: str
    tokens: int
    finish: Finish
    logprob: float  # mean over its tokens, of the distribution sampled from
    raw: float
    correct: bool
    status: ScoreStatus = "ok"
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One prompt and its n answers: a line of answers.jsonl."""

    prompt_id: str
    task: str
    domain: str
    reference: str
    slices: Mapping[str, str] = field(default_factory=dict)  # scalar extra_info, for cutting tasks
    samples: tuple[Sample, ...] = ()

    def usable(self) -> tuple[Sample, ...]:
        """Those whose reward did not fail."""
        return tuple(s for s in self.samples if s.status == "ok")

    @property
    def pass_rate(self) -> float:
        found = self.usable()
        return sum(s.correct for s in found) / len(found) if found else 0.0

    @property
    def mean_score(self) -> float:
        found = self.usable()
        return sum(s.raw for s in found) / len(found) if found else 0.0


def answer_prompts(
    prompts: Sequence[Prompt],
    engines: EngineFleet,
    rewards: Scorer,
    sampling: Sampling,
    *,
    n: int,
    seed: int,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    concurrency: int = CONCURRENCY,
    max_failed_share: float = 1.0,
) -> list[Answers]:
    """Fill `path` up to all of `prompts` and return its lines.

    Raises DataError when `path` holds answers to other prompts, RedoneError when more than max_failed_share
    of the scores failed; errors of engines propagate, what was written stays.
    """
    done = read_answers(path, repair=True)
    ids = [p.id for p in prompts]
    if [a.prompt_id for a in done] != ids[: len(done)]:
        raise DataError(f"{path} holds answers to other prompts; remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = prompts[len(done) :]
    with path.open("a", encoding="utf-8") as file:
        before = len(done)
        done += asyncio.run(
            _answer(
                rest, engines, rewards, sampling, n, seed, concurrency, file,
                lambda more: progress(before + more, len(prompts)),
            )
        )  # fmt: skip
        file.flush()
        os.fsync(file.fileno())
    _check_failures(done, max_failed_share)
    return done


async def _answer(
    prompts: Sequence[Prompt],
    engines: EngineFleet,
    rewards: Scorer,
    sampling: Sampling,
    n: int,
    seed: int,
    concurrency: int,
    file: TextIO,
    progress: Callable[[int], None],
) -> list[Answers]:
    async def answer(prompt: Prompt) -> Answers:
        seeds = [sample_seed(seed, prompt.id, i) for i in range(n)]
        completions = await engines.generate(
            prompt.token_ids.tolist(), sampling.within(prompt.max_tokens), seeds
        )
        scores = await rewards.score_group(prompt, completions)
        return record(prompt, completions, scores)

    return await in_order(
        prompts, answer, lambda a: json.dumps(asdict(a), ensure_ascii=False), file, concurrency, progress
    )


async def in_order(
    items: Sequence[Item],
    work: Callable[[Item], Awaitable[Result]],
    line: Callable[[Result], str],
    file: TextIO,
    concurrency: int,
    progress: Callable[[int], None],
) -> list[Result]:
    """work(item) for all items, `concurrency` at once; lines are appended in the items' order as soon as
    they can be, so a file that was cut short is a prefix of the whole one. The first error is raised."""
    gate = asyncio.Semaphore(concurrency)
    waiting: dict[int, Result] = {}
    written: list[Result] = []

    async def run(place: int, item: Item) -> None:
        async with gate:
            waiting[place] = await work(item)
        while len(written) in waiting:
            found = waiting.pop(len(written))
            file.write(line(found) + "\n")
            file.flush()
            written.append(found)
            progress(len(written))

    try:
        async with asyncio.TaskGroup() as group:
            for place, item in enumerate(items):
                group.create_task(run(place, item))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return written


def record(prompt: Prompt, completions: Sequence[Completion], scores: Sequence[Score]) -> Answers:
    """One line of answers.jsonl."""
    scalars = {k: str(v) for k, v in prompt.extra.items() if isinstance(v, str | int | bool)}
    return Answers(
        prompt_id=prompt.id,
        task=prompt.task,
        domain=prompt.domain,
        reference=reference_text(prompt.reference),
        slices=scalars,
        samples=tuple(
            Sample(
                text=c.text,
                ids=hashlib.blake2b(c.token_ids.tobytes(), digest_size=8).hexdigest(),
                tokens=len(c.token_ids),
                finish=c.finish,
                logprob=float(c.logprobs.astype(np.float64).mean()) if len(c.logprobs) else 0.0,
                raw=s.raw,
                correct=s.correct,
                status=s.status,
                detail=s.detail[:200],
            )
            for c, s in zip(completions, scores, strict=True)
        ),
    )


def read_answers(path: Path, repair: bool = False) -> list[Answers]:
    """The lines of an answers file. repair: a last line that a kill cut short is removed from the file."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data) and repair:
        os.truncate(path, len(whole))
    found = []
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            samples = tuple(Sample(**s) for s in values.pop("samples"))
            found.append(Answers(samples=samples, **values))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a line of answers ({error})") from error
    return found


def repeated_prompts(path: Path) -> list[str]:
    """Prompts that were answered more than once, one sentence each; none for a clean file."""
    counts = Counter(a.prompt_id for a in read_answers(path))
    return [f"prompt {i} answered {n} times" for i, n in counts.items() if n > 1]


def draw_prompts(prompts: PromptSet, max_per_task: int | None, seed: int) -> list[Prompt]:
    """At most max_per_task prompts of each task, chosen by hash, in the files' order."""
    if max_per_task is None:
        return list(prompts.prompts)
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts.prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    kept = set()
    for members in by_task.values():
        ranked = sorted(members, key=lambda p: hashlib.blake2b(f"{seed}/{p.id}".encode()).digest())
        kept |= {p.id for p in ranked[:max_per_task]}
    return [p for p in prompts.prompts if p.id in kept]


def evaluation_of(answers: Sequence[Answers]) -> Evaluation:
    """The same answers as evaluate.compare and the summaries read them."""
    prompts = [_prompt(a) for a in answers]
    labels = label_sets(prompts)
    items = [
        make_item(
            prompt, [_completion(s) for s in a.samples], [_score(s) for s in a.samples], labels.get(a.task)
        )
        for prompt, a in zip(prompts, answers, strict=True)
    ]
    return Evaluation(items=tuple(items))


def domains(answers: Iterable[Answers]) -> dict[str, str]:
    """task -> domain (of its first prompt)."""
    found: dict[str, str] = {}
    for a in answers:
        found.setdefault(a.task, a.domain)
    return found


def _prompt(a: Answers) -> Prompt:
    return Prompt(
        id=a.prompt_id, task=a.task, domain=a.domain, data_source=a.task, messages=(), token_ids=NO_IDS,
        reference=a.reference, reward=a.task,
    )  # fmt: skip


def _completion(sample: Sample) -> Completion:
    return Completion(
        token_ids=np.zeros(sample.tokens, np.int32),
        text=sample.text,
        logprobs=NO_LOGPROBS,
        finish=sample.finish,
        versions=(),
    )


def _score(sample: Sample) -> Score:
    return Score(
        raw=sample.raw, value=sample.raw, correct=sample.correct, detail=sample.detail, status=sample.status
    )


def _check_failures(answers: Sequence[Answers], limit: float) -> None:
    samples = [s for a in answers for s in a.samples]
    failed = [s for s in samples if s.status != "ok"]
    if samples and len(failed) / len(samples) > limit:
        raise RedoneError(
            f"the reward failed on {len(failed)} of {len(samples)} answers, over rollout.max_failed_share="
            f"{limit}; first failure: {failed[0].status}: {failed[0].detail}. Remedy: mend the reward, or "
            "raise the limit"
        )
