"""Chinese words for word-based metrics (jieba, default dictionary)."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")


def has_han(text: str) -> bool:
    return HAN.search(text) is not None


@lru_cache(maxsize=1)
def _jieba() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in jieba's own sources
        import jieba
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    segmenter.tmp_dir = str(_private_folder())
    return segmenter


def _private_folder() -> Path:
    """jieba keeps its dictionary in a file that it loads unchecked: nobody else may write there."""
    folder = Path(tempfile.gettempdir()) / f"redone-jieba-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="redone-jieba-"))
    return folder


def words(text: str) -> list[str]:
    """Words of Chinese or mixed text, blanks apart."""
    return [word for word in _jieba().cut(text) if not word.isspace()]


def cut(text: str) -> list[str]:
    """jieba's own segments, blanks included."""
    return list(_jieba().cut(text))


def spaced(text: str) -> str:
    """A blank on both sides of every Han character: characters take the place of words."""
    return HAN.sub(lambda found: f" {found.group()} ", text)


# the ranges of SNS-Bench's scorer, and `=`, each character a segment of its own
HAN_RELEASED = re.compile(
    "([=\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)
