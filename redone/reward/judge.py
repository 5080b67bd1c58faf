"""Scores by a judge: the task's own reward (VerifierJudge) or a model behind a chat endpoint (LlmJudge).

A verdict that cannot be read, or a question without an answer, is a status and never a zero. Position bias:
a pairwise verdict counts half for each order of the two answers. Length bias: a factor after the verdict.
Answers are shown to the judge between tags that hold a digest of the text, so that an answer cannot close its
own quotation; it can still flatter: what a judge says is an opinion, not a verification.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Literal, Protocol

from redone.api import Scorer
from redone.config.schema import JudgeConfig
from redone.reward.chat import ChatClient, Traffic, UnansweredError, connect, headers, request_body
from redone.reward.rubric import Rubric
from redone.reward.verdicts import VerdictFile
from redone.types import Completion, Prompt

JudgeStatus = Literal["ok", "unparsed", "error"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgeItem:
    """One answer to one prompt. Items of the same prompt (by its id) in one call are candidates."""

    prompt: Prompt
    completion: Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeScore:
    score: float | None  # in [0, 1], after the length guard; None unless status is "ok"
    status: JudgeStatus = "ok"
    parts: Mapping[str, float] = field(default_factory=dict)  # judge: before the guard; length_factor; flips
    detail: str = ""  # the judge's words, or what went wrong


class Judge(Protocol):
    async def score(self, items: Sequence[JudgeItem]) -> list[JudgeScore]:
        """In order. Raises JudgeError when the judge is down; what it had finished stays in its cache."""

    def counts(self) -> dict[str, float]:
        """Since the start: ok, unparsed, error, and what else the judge counts."""


class VerifierJudge:
    """The task's own reward as judge: score = Score.raw."""

    def __init__(self, rewards: Scorer) -> None:
        self._rewards = rewards
        self._counts: Counter[str] = Counter()

    async def score(self, items: Sequence[JudgeItem]) -> list[JudgeScore]:
        found = await asyncio.gather(*(self._rewards.score_group(i.prompt, [i.completion]) for i in items))
        scores = [
            JudgeScore(score=s.raw, parts={"judge": s.raw, **s.parts}, detail=s.detail)
            if s.status == "ok"
            else JudgeScore(score=None, status="error", detail=s.detail)
            for (s,) in found
        ]
        self._counts.update(score.status for score in scores)
        return scores

    def counts(self) -> dict[str, float]:
        return {name: float(self._counts[name]) for name in ("ok", "unparsed", "error")}


@dataclass(frozen=True, slots=True)
class Question:
    """One request. `flip`: the answer to be scored stands second."""

    key: str
    messages: tuple[Mapping[str, str], ...]
    flip: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    value: float | None  # in [0, 1]; pairwise: 1 when the first answer is better
    status: JudgeStatus
    text: str


class LlmJudge:
    """Raises ConfigError when the rubric cannot be used or the variable with the API key is not set."""

    def __init__(self, config: JudgeConfig) -> None:
        headers(config)
        self.config = config
        self.traffic = Traffic()
        self._rubric = Rubric(config)
        self._finished = VerdictFile(config.cache)
        self._counts: Counter[str] = Counter()

    async def score(self, items: Sequence[JudgeItem]) -> list[JudgeScore]:
        async with connect(self.config, self.traffic) as client:
            return await self.score_with(client, items)

    async def score_with(self, client: ChatClient, items: Sequence[JudgeItem]) -> list[JudgeScore]:
        """score() over connections that the caller keeps open."""
        by_prompt: dict[str, list[JudgeItem]] = defaultdict(list)
        for item in items:
            by_prompt[item.prompt.id].append(item)
        asked = [self._questions(item, by_prompt[item.prompt.id]) for item in items]
        verdicts = await self._verdicts(client, [q for questions in asked for q in questions])
        scores = [
            self._join(item, questions, [verdicts[q.key] for q in questions], by_prompt[item.prompt.id])
            for item, questions in zip(items, asked, strict=True)
        ]
        self._counts.update(score.status for score in scores)
        return scores

    def counts(self) -> dict[str, float]:
        """ok, unparsed, error (items); flips (pairs whose verdict changed with the order), length_cut
        (items), cached, unreadable (verdicts, before they were asked for again), requests, retries."""
        names = ("ok", "unparsed", "error", "flips", "length_cut", "cached", "unreadable")
        traffic = {"requests": float(self.traffic.requests), "retries": float(self.traffic.retries)}
        return {name: float(self._counts[name]) for name in names} | traffic

    def _questions(self, item: JudgeItem, candidates: Sequence[JudgeItem]) -> list[Question]:
        """What has to be asked for one item; none when there is nothing to compare it with."""
        text = item.completion.text
        if self.config.mode == "pointwise":
            return [self._question(self._rubric.pointwise(item.prompt, text))]
        if self.config.opponents == "reference":
            others = [r for r in (reference_text(item.prompt),) if r is not None]
        else:
            others = [other.completion.text for other in candidates if other is not item]
        return [
            self._question(self._rubric.pairwise(item.prompt, *pair), flip)
            for other in others
            for flip, pair in ((False, (text, other)), (True, (other, text)))
        ]

    def _question(self, messages: tuple[Mapping[str, str], ...], flip: bool = False) -> Question:
        body = json.dumps(request_body(self.config, messages, self._rubric.schema), sort_keys=True)
        scale = f"{self.config.mode} {self.config.lowest} {self.config.highest} "
        key = hashlib.sha256((scale + self.config.base_url + body).encode("utf-8", "surrogatepass"))
        return Question(key.hexdigest(), messages, flip)

    async def _verdicts(self, client: ChatClient, questions: Iterable[Question]) -> dict[str, Verdict]:
        """Ask what is not yet known, `concurrency` at once; the first JudgeError stops the others."""
        found: dict[str, Verdict] = {}
        missing: dict[str, Question] = {}
        for question in questions:
            known = self._finished.get(question.key)
            if known is None:
                missing[question.key] = question
            elif question.key not in found:
                found[question.key] = Verdict(known, "ok", "")
                self._counts["cached"] += 1
        queue = iter(missing.values())

        async def work() -> None:
            for question in queue:
                found[question.key] = await self._ask(client, question)

        tasks = [asyncio.create_task(work()) for _ in range(min(self.config.concurrency, len(missing)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return found

    async def _ask(self, client: ChatClient, question: Question) -> Verdict:
        messages: tuple[Mapping[str, str], ...] = question.messages
        text = ""
        for _ in range(self.config.parse_retries + 1):
            try:
                text = await client.ask(request_body(self.config, messages, self._rubric.schema))
            except UnansweredError as error:
                return Verdict(None, "error", str(error))
            value = self._rubric.read(text)
            if value is not None:
                self._finished.add(question.key, value, text)
                return Verdict(value, "ok", text)
            self._counts["unreadable"] += 1
            messages = self._rubric.again(question.messages, text)
        return Verdict(None, "unparsed", f"no verdict in: {text[-300:]}")

    def _join(
        self,
        item: JudgeItem,
        questions: Sequence[Question],
        verdicts: Sequence[Verdict],
        candidates: Sequence[JudgeItem],
    ) -> JudgeScore:
        if not verdicts:
            return JudgeScore(
                score=None, status="error", detail="pairwise: nothing to compare the answer with"
            )
        bad = next((v for v in verdicts if v.value is None), None)
        if bad is not None:
            return JudgeScore(score=None, status=bad.status, detail=bad.text)
        values = [
            1.0 - v.value if q.flip else v.value
            for q, v in zip(questions, verdicts, strict=True)
            if v.value is not None
        ]
        judged = fmean(values)
        parts = {"judge": judged}
        if self.config.mode == "pairwise":
            flips = sum(a != b for a, b in zip(values[::2], values[1::2], strict=True))
            self._counts["flips"] += flips
            parts["flips"] = float(flips)
        factor = self._length_factor(item, candidates)
        self._counts["length_cut"] += factor < 1
        return JudgeScore(
            score=judged * factor, parts={**parts, "length_factor": factor}, detail=verdicts[-1].text[-300:]
        )

    def _length_factor(self, item: JudgeItem, candidates: Sequence[JudgeItem]) -> float:
        """1 up to free_length_ratio times the wanted length, 0 from max_length_ratio on, linear between."""
        free, most = self.config.free_length_ratio, self.config.max_length_ratio
        if most is None:
            return 1.0
        reference = reference_text(item.prompt)
        wanted = (
            float(tight_length(reference))
            if reference is not None
            else median(tight_length(other.completion.text) for other in candidates)
        )
        ratio = tight_length(item.completion.text) / max(1.0, wanted)
        if ratio <= free:
            return 1.0
        return 0.0 if ratio >= most else (most - ratio) / (most - free)


def reference_text(prompt: Prompt) -> str | None:
    """The prompt's reference when it is a text with something in it."""
    reference: Any = prompt.reference
    return reference if isinstance(reference, str) and reference.strip() else None


def tight_length(text: str) -> int:
    """Characters without blanks."""
    return len("".join(text.split()))
