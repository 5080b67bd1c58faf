"""Exact match (RedOne 2.0 section 3.2.2, R_EM): a text, a number, one of a closed set, or a set of labels.

A response that names more than it was asked for earns nothing: two numbers, two choices, every label.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from decimal import Decimal

from redone.config.schema import ExactReward
from redone.reward.base import failed, make_score
from redone.reward.extract import extract, fold, normalise, word_pattern
from redone.types import Completion, Prompt, Score

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUMBER = re.compile(
    r"(?<![0-9A-Za-z_.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,4})?(?:\s?/\s?\d+)?%?"
)
MAX_DIGITS = 400  # longer numbers are nobody's answer
MAX_LITERAL = 20_000  # characters of a list that is parsed as a literal
TOLERANCE = Decimal("1e-6")  # relative


class Exact:
    """A RewardFn. The reference is a text, a number, a bool, or a list of them: alternatives, of which any
    one counts, except with answer=labels, where it is the set itself."""

    def __init__(self, config: ExactReward) -> None:
        self._config = config
        self._match = {
            "text": self._text,
            "number": self._number,
            "choice": self._choice,
            "labels": self._labels,
        }[config.answer]

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        config, reference = self._config, prompt.reference
        if isinstance(reference, str | int | float):
            values: list[str | int | float] = [reference]
        elif isinstance(reference, list | tuple | set) and all(
            isinstance(v, str | int | float) for v in reference
        ):
            values = list(reference)
        else:
            return failed(f"exact reward cannot compare with the reference {prompt.reference!r:.80}")
        if not values and config.answer != "labels":
            return failed("exact reward: the reference is an empty list")
        if config.require_stop and completion.finish != "stop":
            return make_score(0.0, config, detail=f"not finished ({completion.finish})")
        answer = extract(completion.text, config)
        if answer is None:
            return make_score(0.0, config, detail=f"no answer found (extract={config.extract})")
        return self._match(prompt, [str(v) for v in values], answer)

    def _normal(self, text: str) -> str:
        return normalise(
            text,
            ignore_case=self._config.ignore_case,
            strip_punctuation=self._config.strip_punctuation,
        )

    def _text(self, prompt: Prompt, accepted: list[str], answer: str) -> Score:
        found = self._normal(answer)
        return make_score(float(any(found == self._normal(a) for a in accepted)), self._config, detail=found)

    def _number(self, prompt: Prompt, accepted: list[str], answer: str) -> Score:
        wanted = [the_number(a.rsplit("####", 1)[-1]) for a in accepted]
        if None in wanted:
            return failed(f"exact reward: the reference {prompt.reference!r:.80} is no number")
        found = the_number(answer)
        if found is None:
            return make_score(0.0, self._config, detail="not one number")
        hit = any(w is not None and _close(found, w) for w in wanted)
        return make_score(float(hit), self._config, detail=str(found))

    def _choice(self, prompt: Prompt, accepted: list[str], answer: str) -> Score:
        labels = self._labels_of(prompt)
        if not labels:
            return failed("answer=choice needs the reward's `labels`, or extra_info.choices in the row")
        known = [self._normal(label) for label in labels]
        wanted = {self._resolve(a, known) for a in accepted}
        if None in wanted:
            return failed(f"the reference {prompt.reference!r:.80} is none of the choices {labels!r:.200}")
        found = self._resolve(answer, known)
        if found is None:
            return make_score(0.0, self._config, detail="not one of the choices")
        return make_score(float(found in wanted), self._config, detail=known[found])

    def _resolve(self, text: str, known: Sequence[str]) -> int | None:
        """Index of the one choice that `text` names, by label or by letter; None for none or two."""
        normal = self._normal(text)
        if normal in known:
            return known.index(normal)
        hits = _named(normal, known)
        if len(hits) == 1:
            return hits.pop()
        # letters stand for the choices in their order, unless the labels are letters themselves
        if not hits and all(len(label) > 1 or not label.isascii() for label in known):
            letters = LETTERS[: len(known)]
            by_letter = {
                letters.index(c)
                for c in re.findall(r"(?<![A-Za-z0-9])([A-Z])(?![A-Za-z0-9])", fold(text))
                if c in letters
            }
            bare = normal.upper()
            if len(bare) == 1 and bare in letters:
                return letters.index(bare)
            return by_letter.pop() if len(by_letter) == 1 else None
        return None

    def _labels(self, prompt: Prompt, accepted: list[str], answer: str) -> Score:
        """F1 of two sets; 1 iff both are empty when one is."""
        single = not isinstance(prompt.reference, list | tuple | set)
        gold = {self._normal(v) for v in (self._split(accepted[0]) if single else accepted)} - {""}
        listed = [v for v in map(self._normal, self._split(answer)) if v]
        found = set(listed)
        detail = ", ".join(sorted(found))[:200]
        limit = self._config.max_labels or 2 * max(1, len(gold))
        everything = {self._normal(label) for label in self._labels_of(prompt)}
        if len(listed) > limit:
            return make_score(0.0, self._config, detail=f"{len(listed)} labels, at most {limit}")
        if everything and found >= everything and gold != found:
            return make_score(0.0, self._config, detail="every label listed")
        if not gold or not found:
            return make_score(float(gold == found), self._config, detail=detail)
        hits = len(gold & found)
        return make_score(2 * hits / (len(gold) + len(found)), self._config, detail=detail)

    def _split(self, text: str) -> list[str]:
        literal = parse_list(text)
        if literal is not None:
            return literal
        return re.split(f"[{re.escape(self._config.separators)}]", text)

    def _labels_of(self, prompt: Prompt) -> Sequence[str]:
        found = self._config.labels or prompt.extra.get("choices") or ()
        return [found] if isinstance(found, str) else [str(label) for label in found]


def _named(text: str, known: Sequence[str]) -> set[int]:
    """Choices that occur in `text` as whole words; one inside a longer one that was found does not count."""
    hits: set[int] = set()
    for index in sorted(range(len(known)), key=lambda i: -len(known[i])):
        if known[index] and known[index] in text:
            text, count = word_pattern(known[index]).subn(" ", text)
            if count:
                hits.add(index)
    return hits


def the_number(text: str) -> Decimal | None:
    """The only number in `text` (thousands commas, a fraction, a percent sign, an exponent); None for none or
    several."""
    found = [m.group() for m in NUMBER.finditer(fold(text))]
    if len({f.rstrip("%") for f in found}) != 1 or len(found[0]) > MAX_DIGITS:
        return None
    literal = found[0].replace(",", "").replace(" ", "")
    percent = literal.endswith("%")
    top, _, bottom = literal.rstrip("%").partition("/")
    try:
        value = Decimal(top) / Decimal(bottom) if bottom else Decimal(top)
        return value / 100 if percent else value
    except ArithmeticError:  # 1/0, and exponents beyond Decimal's range
        return None


def _close(a: Decimal, b: Decimal) -> bool:
    try:
        return a == b or abs(a - b) <= TOLERANCE * abs(b)
    except ArithmeticError:
        return False


def parse_list(text: str) -> list[str] | None:
    """A Python or JSON list of scalars as texts; None when `text` is not one. Nothing is evaluated."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > MAX_LITERAL:
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(found, list) or not all(isinstance(v, str | int | float) for v in found):
        return None
    return [str(v) for v in found]
