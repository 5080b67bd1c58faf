"""Prompts and completions for reward tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from redone.types import Completion, Finish, Prompt

NO_IDS = np.zeros(1, dtype=np.int32)


def prompt(reference: Any = "", reward: str = "r", **extra: Any) -> Prompt:
    return Prompt(
        id="p",
        task="t",
        domain="sns",
        data_source="d",
        messages=(),
        token_ids=NO_IDS,
        reference=reference,
        reward=reward,
        extra=extra,
    )


def answer(text: str, finish: Finish = "stop") -> Completion:
    return Completion(
        token_ids=NO_IDS, text=text, logprobs=np.zeros(1, dtype=np.float32), finish=finish, versions=()
    )
