"""Exact match of a normalised answer: 1 or 0 (RedOne 2.0 section 3.2.2, R_EM)."""

from __future__ import annotations

import re
import string
import unicodedata

from redone.config.schema import ExactReward
from redone.reward.base import failed, make_score
from redone.types import Completion, Prompt, Score

BOX = "\\boxed{"


class Exact:
    """A RewardFn. The reference is a text, a number, a bool, or a list of them (any one counts)."""

    def __init__(self, config: ExactReward) -> None:
        self._config = config

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        config = self._config
        accepted = self._accepted(prompt.reference)
        if accepted is None:
            return failed(f"exact reward cannot compare with the reference {prompt.reference!r:.80}")
        if config.require_stop and completion.finish != "stop":
            return make_score(0.0, config, detail=f"not finished ({completion.finish})")
        answer = extract(completion.text, config)
        if answer is None:
            return make_score(0.0, config, detail=f"no answer found (extract={config.extract})")
        found = normalise(answer, config)
        return make_score(float(found in accepted), config, detail=found)

    def _accepted(self, reference: object) -> set[str] | None:
        values = list(reference) if isinstance(reference, list | tuple | set) else [reference]
        if not values or not all(isinstance(value, str | int | float) for value in values):
            return None
        return {normalise(str(value), self._config) for value in values}


def extract(text: str, config: ExactReward) -> str | None:
    """Where the answer stands: the last <tag>...</tag>, the last non-empty line, the last \\boxed{...}, or
    all of the text. None when the response has no such place."""
    if config.extract == "tag":
        tag = re.escape(config.tag)
        found = re.findall(rf"<{tag}>((?:(?!<{tag}>).)*?)</{tag}>", text, flags=re.DOTALL)
        return found[-1] if found else None
    if config.extract == "last_line":
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else None
    if config.extract == "box":
        return last_box(text)
    return text


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...}, braces balanced; None when it is absent or unclosed."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth, begin = 1, start + len(BOX)
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at]
    return None


def normalise(text: str, config: ExactReward) -> str:
    """NFKC (full-width letters, digits and signs become ASCII), blanks collapsed; case and punctuation as
    configured.

    Punctuation is dropped at both ends only, and kept when nothing else is there.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    if config.ignore_case:
        text = text.casefold()
    if config.strip_punctuation:
        text = _strip_punctuation(text) or text
    return text


def _strip_punctuation(text: str) -> str:
    begin, end = 0, len(text)
    while begin < end and _is_outer(text[begin]):
        begin += 1
    while end > begin and _is_outer(text[end - 1]):
        end -= 1
    return text[begin:end]


def _is_outer(char: str) -> bool:
    """A blank, ASCII punctuation, or any Unicode punctuation (full-width, CJK brackets and stops,
    quotes)."""
    return char.isspace() or char in string.punctuation or unicodedata.category(char).startswith("P")
