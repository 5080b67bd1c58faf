"""Where the answer stands in a response, and what of its spelling does not matter."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import lru_cache

from redone.config.schema import AnswerReward

BOX = "\\boxed{"


def extract(text: str, config: AnswerReward) -> str | None:
    """The last <tag>...</tag>, the last non-empty line, the last \\boxed{...}, or all of the text.

    None when the response has no such place.
    """
    if config.extract == "tag":
        return last_tag(text, config.tag)
    if config.extract == "last_line":
        lines = text.rstrip().splitlines()
        return lines[-1] if lines else None
    if config.extract == "box":
        return last_box(text)
    return text


def last_tag(text: str, tag: str) -> str | None:
    """Content of the last complete <tag>...</tag> (innermost, where an opening tag is repeated)."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    return None if start < 0 else text[start + len(tag) + 2 : end].split(f"</{tag}>")[0]


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


def fold(text: str) -> str:
    """NFKC (full-width letters, digits and signs become ASCII) and single blanks."""
    if not text.isascii():  # ASCII is its own normal form
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split())


def normalise(text: str, *, ignore_case: bool = True, strip_punctuation: bool = True) -> str:
    """fold(), then case and outer punctuation as asked.

    Punctuation is dropped at both ends only, and kept when nothing else is there.
    """
    text = fold(text)
    if ignore_case:
        text = text.casefold()
        if not text.isascii():  # casefold can undo the normal form (U+0345), so the form is restored
            text = unicodedata.normalize("NFKC", text)
    if strip_punctuation:
        text = strip_outer(text) or text
    return text


def strip_outer(text: str) -> str:
    """Without blanks and punctuation at both ends."""
    begin, end = 0, len(text)
    while begin < end and _is_outer(text[begin]):
        begin += 1
    while end > begin and _is_outer(text[end - 1]):
        end -= 1
    return text[begin:end]


def _is_outer(char: str) -> bool:
    """A blank, ASCII punctuation, or any Unicode punctuation (CJK brackets and stops, quotes)."""
    return char.isspace() or char in string.punctuation or unicodedata.category(char).startswith("P")


@lru_cache(maxsize=4096)
def word_pattern(word: str) -> re.Pattern[str]:
    """Finds `word` where no ASCII letter or digit touches it: `no` is not in `know`; CJK needs no blanks."""
    return re.compile(rf"(?<![0-9A-Za-z]){re.escape(word)}(?![0-9A-Za-z])")
