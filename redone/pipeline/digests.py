"""Content digests of files and folders, and of plain values: what a node's fingerprint is made of."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import xxhash

from redone.errors import DataError
from redone.pipeline.folder import write_json

CHUNK = 1 << 22


class Digests:
    """xxh3-128 of files, remembered by (path, size, modification time) in `path` between runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def of(self, target: str | Path) -> str:
        """Of a file's bytes; of a folder: of its files' names and bytes, hidden ones left out.

        Raises DataError when there is nothing at `target`.
        """
        path = Path(target)
        if path.is_dir():
            files = sorted(
                p for p in path.rglob("*") if p.is_file() and not p.relative_to(path).parts[0].startswith(".")
            )
            entries = [[p.relative_to(path).as_posix(), self._file(p)] for p in files]
            digest = of_value(entries)
        elif path.is_file():
            digest = self._file(path)
        else:
            raise DataError(f"{target}: no such file or folder")
        self._save()
        return digest

    def _file(self, path: Path) -> str:
        stat = path.stat()
        key, seen = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(key)
        if known is not None and known[:2] == seen:
            return str(known[2])
        hasher = xxhash.xxh3_128()
        with path.open("rb") as f:
            while chunk := f.read(CHUNK):
                hasher.update(chunk)
        self._known[key] = [*seen, hasher.hexdigest()]
        return hasher.hexdigest()

    def _save(self) -> None:
        if self._path.parent.is_dir():
            write_json(self._path, {k: v for k, v in self._known.items() if os.path.exists(k)})


def of_value(value: Any) -> str:
    """Of a JSON value; mappings in any order are equal."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
