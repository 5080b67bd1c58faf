"""Finished verdicts of a judge in a jsonl file: they survive a crash and are not asked for again."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from redone.errors import ConfigError, JudgeError

log = logging.getLogger(__name__)


class VerdictFile:
    """key -> value in [0, 1]. One line per verdict, written whole and at once; a line that a crash cut short
    is skipped and counted. Without a path everything stays in memory. Raises ConfigError when the file cannot
    be opened."""

    def __init__(self, path: str | None) -> None:
        self._values: dict[str, float] = {}
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b", buffering=0) as file:
                file.seek(0)
                data = file.read()
                if data and not data.endswith(b"\n"):
                    file.write(b"\n")
        except OSError as error:
            raise ConfigError(f"cache={path} cannot be used: {error}; name another file") from error
        self._read(data)

    def get(self, key: str) -> float | None:
        return self._values.get(key)

    def add(self, key: str, value: float, text: str) -> None:
        """Raises JudgeError when the disk is full or the file cannot be written any more."""
        self._values[key] = value
        if self._path is None:
            return
        line = json.dumps({"key": key, "value": value, "text": text}, ensure_ascii=True) + "\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            raise JudgeError(
                f"cache={self._path} cannot be written: {error}; free the disk or move it"
            ) from error

    def __len__(self) -> int:
        return len(self._values)

    def _read(self, data: bytes) -> None:
        skipped = 0
        for line in data.splitlines():
            try:
                entry = json.loads(line)
                value = float(entry["value"])
                if not 0.0 <= value <= 1.0:
                    raise ValueError(value)
                self._values[str(entry["key"])] = value
            except (ValueError, KeyError, TypeError):
                skipped += 1
        if skipped:
            log.warning("%s: %d unreadable line(s) skipped, to be asked for again", self._path, skipped)
