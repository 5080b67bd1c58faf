"""A small suite with its data, a chat of made-up tokens, and a fleet that answers from a table."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from redone.evaluate.suite import Suite, load_suite
from redone.types import Completion, Message, Prompt, Sampling, Score

YAML = """
name: toy
title: Toy
defaults:
  data: toy.jsonl
  prompt: {user: "Say {answer} or not: {question}"}
  max_tokens: 8
parts:
  - id: words
    where: {kind: word}
    metrics: {exact: {kind: reward, reward: {family: exact}}}
    policies: {"echo": "{question}"}
  - id: lists
    data: lists.json
    metrics:
      released: {kind: sns_released, file: Note-CHLW}
      corrected: {kind: sns_corrected, file: Note-CHLW}
    policies: {"always []": "[]", "the scorer's variable": "reference"}
tables:
  both: {Words: [words/exact], Lists: [lists/released]}
"""


def write_toy(folder: Path, items: int = 12) -> Suite:
    """`items` word questions (answers yes, no, no in turn) and four lists, two of them empty."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        {"kind": "word", "question": f"q{i}", "answer": ("yes", "no", "no")[i % 3]} for i in range(items)
    ]
    other = {"kind": "number", "question": "n", "answer": "1"}
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [other, *words]))
    lists = [{"question": f"l{i}", "answer": a} for i, a in enumerate(("['a']", "[]", "['b', 'c']", "[]"))]
    (folder / "lists.json").write_text(json.dumps(lists))
    path = folder / "toy.yaml"
    path.write_text(YAML)
    return load_suite(str(path))


class ToyChat:
    """One token per character."""

    stop_token_ids = (0,)

    def prompt_ids_batch(self, conversations: Sequence[Sequence[Message]]) -> list[Any]:
        return [
            np.frombuffer("\n".join(m.content for m in talk).encode(), np.uint8).astype(np.int32)
            for talk in conversations
        ]


class ToyFleet:
    """redone.api.EngineFleet as far as evaluation needs it. Fails after `fail_after` calls."""

    def __init__(self, answer: Callable[[str], str], fail_after: int | None = None) -> None:
        self.answer, self.fail_after = answer, fail_after
        self.asked: list[str] = []
        self.seeds: list[tuple[int, ...]] = []

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            await asyncio.sleep(0.05)  # those before it have their answers by now
            raise RuntimeError("the engine died")
        text = bytes(prompt_ids).decode()
        self.asked.append(text)
        self.seeds.append(tuple(seeds))
        return [said(self.answer(text)) for _ in seeds]


class ToyRewards:
    """Scorer: right iff the text is the reference; an answer `broken` cannot be scored."""

    async def score_group(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        return [self.score(prompt, completion) for completion in completions]

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        right = completion.text == prompt.reference
        status = "error" if completion.text == "broken" else "ok"
        return Score(raw=float(right), value=float(right), correct=right, status=status)  # type: ignore[arg-type]


def said(text: str) -> Completion:
    return Completion(
        token_ids=np.arange(1, 4, dtype=np.int32), text=text, logprobs=np.zeros(3, np.float32),
        finish="stop", versions=(),
    )  # fmt: skip
