"""Rows of files with the ids that their prompts have everywhere, and rows as nodes write them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redone.config.schema import Config
from redone.data.prompts import Row, content_key, parse_row, prompt_id, read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A row as the file has it, understood, with its prompt's id."""

    id: str
    values: Mapping[str, Any]
    row: Row


def known_rows(files: Sequence[str], cfg: Config) -> Iterator[Known]:
    """Every row of every file. Raises DataError that names file and line of one that cannot be used."""
    seen: Counter[str] = Counter()
    for file in files:
        for place, values in read_rows(file):
            row = parse_row(values, place, cfg)
            key = content_key(row)
            seen[key] += 1
            yield Known(id=prompt_id(key, seen[key]), values=values, row=row)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """jsonl, atomically; returns how many."""
    partial = path.with_name(f".{path.name}.partial")
    count = 0
    with partial.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    os.replace(partial, path)
    return count


def rank(seed: int, *parts: str) -> bytes:
    """A stable random order: sort by it."""
    return hashlib.blake2b(json.dumps([seed, *parts]).encode(), digest_size=8).digest()
