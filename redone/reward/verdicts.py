"""Finished verdicts of a judge in a jsonl file: they survive a crash and are not asked for again."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from redone.errors import ConfigError

log = logging.getLogger(__name__)


class VerdictFile:
    """key -> value in [0, 1]. One line per verdict, written whole and at once; a line that a crash cut short
    is skipped and counted. Without a path everything stays in memory. Raises ConfigError when the file cannot
    be opened."""

    def __init__(self, path: str | None) -> None:
        self._values: dict[str, float] = {}
        self._descriptor: int | None = None
        if path is None:
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            data = Path(path).read_bytes() if Path(path).exists() else b""
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"cache={path} cannot be used: {error}; name another file") from error
        self._read(path, data)
        if data and not data.endswith(b"\n"):
            os.write(self._descriptor, b"\n")

    def get(self, key: str) -> float | None:
        return self._values.get(key)

    def add(self, key: str, value: float, text: str) -> None:
        self._values[key] = value
        if self._descriptor is not None:
            line = json.dumps({"key": key, "value": value, "text": text}, ensure_ascii=True) + "\n"
            os.write(self._descriptor, line.encode())

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __len__(self) -> int:
        return len(self._values)

    def _read(self, path: str, data: bytes) -> None:
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
            log.warning(
                "%s: %d unreadable line(s) skipped; those verdicts will be asked for again", path, skipped
            )
