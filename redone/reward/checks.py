"""Checks beside IFEval's: patterns, JSON schemas, words, counts, language. Text and arguments -> bool."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from redone.reward.extract import fold, word_pattern
from redone.reward.ifeval import INSTRUCTIONS, Args, Checker, count_sentences, language_of
from redone.reward.segment import HAN

WORD = re.compile(r"\w+")
FENCED = re.compile(r"\A```\w*\n(.*)\n```\Z", re.DOTALL)


def regex(text: str, args: Args) -> bool:
    """pattern; full: the whole text must match; min, max: how often it may occur (default: at least once)."""
    pattern = re.compile(str(args["pattern"]), re.DOTALL if args.get("dotall", True) else 0)
    if args.get("full"):
        return pattern.fullmatch(text.strip()) is not None
    if "min" in args or "max" in args:
        return _within(sum(1 for _ in pattern.finditer(text)), args)
    return pattern.search(text) is not None


def json_schema(text: str, args: Args) -> bool:
    """The text, fences apart, is JSON and satisfies `schema` (JSON Schema; without one any JSON will do)."""
    stripped = text.strip()
    fenced = FENCED.match(stripped)
    try:
        value = json.loads(fenced[1] if fenced else stripped)
    except (ValueError, RecursionError):
        return False
    if "schema" not in args:
        return True
    from jsonschema import Draft202012Validator

    return bool(Draft202012Validator(args["schema"]).is_valid(value))


def required(text: str, args: Args) -> bool:
    """Every one of `words` occurs, as a word where it is written in Latin letters."""
    return _count_words(text, args["words"]) == len(args["words"])


def forbidden(text: str, args: Args) -> bool:
    """None of `words` occurs."""
    return _count_words(text, args["words"]) == 0


def count(text: str, args: Args) -> bool:
    """Between `min` and `max` of `unit`: characters, words, sentences, lines, paragraphs."""
    return _within(UNITS[args.get("unit", "words")](text), args)


def language(text: str, args: Args) -> bool:
    """The detected language is `language`; `zh` stands for every Chinese."""
    found = language_of(text)
    return found is not None and (found == args["language"] or found.split("-")[0] == args["language"])


def count_words(text: str) -> int:
    """Every Han character is one, and so is every run of other letters and digits."""
    han = 0
    if not text.isascii():
        text, han = HAN.subn(" ", text)
    return han + len(WORD.findall(text))


UNITS: dict[str, Callable[[str], int]] = {
    "characters": lambda text: len("".join(text.split())),
    "words": count_words,
    "sentences": count_sentences,
    "lines": lambda text: sum(bool(line.strip()) for line in text.splitlines()),
    "paragraphs": lambda text: sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text)),
}
CHECKERS: dict[str, Checker] = {
    **INSTRUCTIONS,
    "regex": regex,
    "json_schema": json_schema,
    "required": required,
    "forbidden": forbidden,
    "count": count,
    "language": language,
}


def _within(found: int, args: Args) -> bool:
    return bool(args.get("min", 0) <= found <= args.get("max", found))


def _count_words(text: str, words: Sequence[str]) -> int:
    folded = fold(text).casefold()
    return sum(word_pattern(fold(str(word)).casefold()).search(folded) is not None for word in words)
