"""Values and fakes of our own interfaces for the pipeline's tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from redone.config.load import config_from_dict
from redone.config.schema import Config
from redone.pipeline.answers import Answers, Sample
from redone.types import Completion, Message, Prompt, Sampling, Score


def config(**changes: Any) -> Config:
    values: dict[str, Any] = {"model": {"path": "m"}, "rewards": {"default": {"family": "exact"}}}
    return config_from_dict({**values, **changes})


def prompt(name: str, task: str = "t", reference: str = "x", domain: str = "sns", **extra: Any) -> Prompt:
    return Prompt(
        id=name,
        task=task,
        domain=domain,
        data_source=task,
        messages=(Message(role="user", content=name),),
        token_ids=np.frombuffer(name.encode(), np.uint8).astype(np.int32),
        reference=reference,
        reward="default",
        extra=extra,
    )


def sample(text: str = "a", raw: float = 0.0, **changes: Any) -> Sample:
    values: dict[str, Any] = dict(
        text=text, ids="", tokens=len(text), finish="stop", logprob=-1.0, raw=raw, correct=raw >= 1.0
    )
    return Sample(**{**values, **changes})


def answers(name: str, raws: Sequence[float], task: str = "t", **changes: Any) -> Answers:
    values: dict[str, Any] = dict(
        prompt_id=name,
        task=task,
        domain="sns",
        reference="x",
        samples=tuple(sample(f"w{r}", r) for r in raws),
    )
    return Answers(**{**values, **changes})


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


class Engines:
    """Answers are a function of prompt and seed. Stops by an exception after `limit` prompts."""

    def __init__(self, limit: int | None = None) -> None:
        self.asked: list[bytes] = []
        self.limit = limit

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        if self.limit is not None and len(self.asked) >= self.limit:
            raise InterruptedError("killed")
        self.asked.append(bytes(prompt_ids))
        return [
            Completion(
                token_ids=np.asarray([*prompt_ids, seed % 97], np.int32),
                text=f"{bytes(prompt_ids).decode()}{seed % 2}",
                logprobs=np.full(len(prompt_ids) + 1, -0.5, np.float32),
                finish="stop",
                versions=(),
            )
            for seed in seeds
        ]


class Rewards:
    """1 when the text ends with `good`; status `status` for prompts named in `broken`."""

    def __init__(self, good: str = "1", broken: Sequence[str] = ()) -> None:
        self.good, self.broken = good, broken

    async def score_group(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        return [self.score(prompt, completion) for completion in completions]

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        if prompt.id in self.broken:
            return Score(raw=0.0, value=0.0, correct=False, status="error", detail="no verdict")
        raw = float(completion.text.endswith(self.good))
        return Score(raw=raw, value=raw, correct=raw == 1.0)
